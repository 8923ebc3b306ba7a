"""The hooks that modules and datamodules may define, as they are where nobody does: `hooks.py` says when each runs.

A hook that is not overridden is not called in the step; what stands here is for `super()` and for callers of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_fast.errors import MisconfigurationException

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module  # what ModelHooks is mixed into
    from torch.optim import Optimizer
else:
    Module = object


class ModelHooks(Module):
    """What a module may do around training, validation, test and prediction."""

    def configure_model(self) -> None: ...

    def configure_sharded_model(self) -> None:
        """An older name of `configure_model`."""

    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None: ...
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...

    def on_validation_model_zero_grad(self) -> None:
        """Release gradients before validation, so that their memory is free meanwhile."""
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        """Override to choose which submodules validate in evaluation mode; all of them by default."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Override to choose which submodules train afterwards; where it is not, each is as it was before."""
        self.train()

    def on_test_model_eval(self) -> None:
        self.eval()

    def on_test_model_train(self) -> None:
        self.train()

    def on_predict_model_eval(self) -> None:
        self.eval()


class DataHooks:
    """Where data comes from, how it is prepared, and how a batch reaches the device."""

    prepare_data_per_node = True
    allow_zero_length_dataloader_with_multiple_devices = False

    def prepare_data(self) -> None:
        """Write what the data sets need to disk. Runs in one process: others do not see what it sets."""

    def setup(self, stage: str) -> None:
        """Make the data sets. `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Let go of what `setup` made."""

    def train_dataloader(self) -> Any:
        """The training data: a loader, or a list or dict of loaders."""
        raise self._no_data("training data", "train", "trainer.fit(model, train_dataloaders=...)")

    def val_dataloader(self) -> Any:
        """The validation data: a loader, or a list of loaders."""
        raise self._no_data("validation data", "val", "val_dataloaders=... (trainer.validate: dataloaders=...)")

    def test_dataloader(self) -> Any:
        """The test data: a loader, or a list of loaders."""
        raise self._no_data("test data", "test", "trainer.test(model, dataloaders=...)")

    def predict_dataloader(self) -> Any:
        """The data to predict on: a loader, or a list of loaders."""
        raise self._no_data("data to predict on", "predict", "trainer.predict(model, dataloaders=...)")

    def _no_data(self, what: str, name: str, instead: str) -> MisconfigurationException:
        return MisconfigurationException(
            f"No {what}: {type(self).__name__} has no {name}_dataloader; define the method, or pass {instead}."
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it moves to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; override it for a type that `lit_fast.data.move` does not know how to move."""
        from lit_fast.data.transfer import move

        return move(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device."""
        return batch


class CheckpointHooks:
    """What a module may read from, or add to, a checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...
