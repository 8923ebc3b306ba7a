"""The base of every callback: Lightning's hooks, none of which does anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Callback:
    """Something that is called at named points of a run. Override what you need; the rest costs nothing.

    A hook that a callback does not override is never bound into the step, so a callback pays only for what
    it does.

    Attributes:
        reads_gradients: may one of its hooks look at `p.grad` after the optimizer's step? Where True (and
            such a hook is overridden) clipped gradients are written back to memory, where it can see them.
            Every subclass starts at True again and says itself when it never looks.

    Example::

        class PrintLoss(Callback):
            reads_gradients = False

            def on_train_epoch_end(self, trainer, pl_module):
                print(trainer.callback_metrics["loss"])
    """

    reads_gradients: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "reads_gradients" not in cls.__dict__:
            cls.reads_gradients = True

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; two callbacks of one class need different ones."""
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """A state key that tells instances apart by the options given here."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def live_hooks(self, trainer: Any = None) -> set[str]:
        """Names of the hooks that must be called, asked once when the run is bound.

        By default every hook that the class (or the instance itself) overrides. A subclass may leave out
        hooks that its options do not use.
        """
        own = vars(self)
        return {name for name in HOOK_NAMES if name in own or getattr(type(self), name) is not getattr(Callback, name)}

    def _without(self, live: set[str], base: type[Callback], *unused: str) -> set[str]:
        """`live` less the `unused` hooks, but for those that a subclass of `base` overrides anew."""
        return live - {name for name in unused if getattr(type(self), name) is getattr(base, name)}

    # -- a run

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit, validate, test or predict begins (`stage` names it)."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit, validate, test or predict ends."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fit begins, the module is on its device."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit ends."""

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """The validation batches before training begin."""

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """The validation batches before training are through."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The run is ending by `exception` (KeyboardInterrupt too)."""

    # -- stages

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Training begins."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training ends."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation begins."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Validation ends."""

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Testing begins."""

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Testing ends."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Prediction begins."""

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Prediction ends."""

    # -- epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A training epoch begins."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A training epoch ends."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass over the validation data begins."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A pass over the validation data ends."""

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass over the test data begins."""

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A pass over the test data ends."""

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A pass over the prediction data begins."""

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A pass over the prediction data ends."""

    # -- batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A training batch is on the device."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A training batch is done; `outputs` is what `training_step` returned."""

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch is on the device."""

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch is done."""

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test batch is on the device."""

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test batch is done."""

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A prediction batch is on the device."""

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A prediction batch is done."""

    # -- inside a training step

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Gradients are about to be released."""

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Backward is about to run on `loss` (already divided over the accumulation window)."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Backward has run; gradients are not clipped yet."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """The optimizer is about to step; gradients are not clipped yet."""

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, under `state_key`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is being put together; `checkpoint` may be changed."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has been read and is about to be applied."""


_NOT_HOOKS = {"live_hooks", "state_key"}
HOOK_NAMES: tuple[str, ...] = tuple(
    name for name, value in vars(Callback).items() if callable(value) and name[0] != "_" and name not in _NOT_HOOKS
)
