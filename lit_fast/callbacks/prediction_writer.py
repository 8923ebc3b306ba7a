"""The base of callbacks that write predictions to disk."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException


class WriteInterval(str, Enum):
    """When predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Override `write_on_batch_end`, `write_on_epoch_end` or both, and say with `write_interval` which one is called.

    `batch_indices` tells which samples of the dataset a prediction belongs to: for one batch their indices, for the
    epoch a list over loaders of lists over batches of indices. Empty lists where the loader does not tell (an iterable
    dataset, or no DataLoader).

    Args:
        write_interval: "batch", "epoch" or "batch_and_epoch".

    Raises:
        MisconfigurationException: another interval.
        NotImplementedError: the module's `predict_step` takes `dataloader_iter`.

    Example::

        class Writer(BasePredictionWriter):
            def write_on_batch_end(
                self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
            ):
                torch.save({"indices": batch_indices, "prediction": prediction}, f"{batch_idx}.pt")

        Trainer(callbacks=[Writer("batch")]).predict(model, loader, return_predictions=False)
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        super().__init__()
        try:
            self.interval = WriteInterval(write_interval)
        except ValueError:
            raise MisconfigurationException(
                f"{type(self).__name__}(write_interval={write_interval!r}): allowed are "
                f"{', '.join(repr(interval.value) for interval in WriteInterval)}."
            ) from None

    def live_hooks(self, trainer: Any = None) -> set[str]:
        unused = [] if self.interval.on_batch else ["on_predict_batch_end"]
        unused += [] if self.interval.on_epoch else ["on_predict_epoch_end"]
        return self._without(super().live_hooks(trainer), BasePredictionWriter, *unused)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if "dataloader_iter" in inspect.signature(pl_module.predict_step).parameters:
            raise NotImplementedError(
                f"{type(self).__name__} cannot tell which samples a predict_step(dataloader_iter) has read; define "
                f"predict_step(self, batch, batch_idx)."
            )

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the prediction of one batch."""
        raise NotImplementedError(self._missing("write_on_batch_end"))

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all predictions: a list over batches, or with several loaders a list over loaders of such lists."""
        raise NotImplementedError(self._missing("write_on_epoch_end"))

    def _missing(self, method: str) -> str:
        return f"{type(self).__name__}(write_interval={self.interval.value!r}) needs a method {method}; define it."

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)
