"""What a module must define, and what it had better not, before it runs: said once, in one place, before the data."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from lit_fast.errors import (
    LightningDeprecationWarning,
    MisconfigurationException,
    PossibleUserWarning,
    RemovedHookError,
)
from lit_fast.hooks import is_overridden
from lit_fast.module import LightningModule
from lit_fast.states import TrainerFn

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

# Hooks of Lightning 1.x that nothing calls: name -> what took its place.
REMOVED = {
    TrainerFn.FITTING: {
        "training_epoch_end": "on_train_epoch_end",
        "validation_epoch_end": "on_validation_epoch_end",
    },
    TrainerFn.VALIDATING: {"validation_epoch_end": "on_validation_epoch_end"},
    TrainerFn.TESTING: {"test_epoch_end": "on_test_epoch_end"},
    TrainerFn.PREDICTING: {},
}
TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def check_hooks(trainer: Trainer, module: LightningModule, fn: TrainerFn) -> None:
    """What concerns every method of the Trainer.

    Raises:
        RemovedHookError: a hook that nothing calls any more.
        MisconfigurationException: two hooks for one thing.
    """
    name = type(module).__name__
    for old, new in REMOVED[fn].items():
        if callable(getattr(module, old, None)):
            raise RemovedHookError(
                f"{name} defines {old}(outputs), which nothing has called since Lightning 2.0: gather what you need on "
                f"self in the step, and reduce it in {new}(self)."
            )
    if is_overridden("configure_sharded_model", module, LightningModule):
        if is_overridden("configure_model", module, LightningModule):
            raise MisconfigurationException(
                f"{name} defines both configure_model and configure_sharded_model, an older name of the same hook; "
                f"keep configure_model."
            )
        warnings.warn(
            f"{name}.configure_sharded_model is an older name of configure_model; rename it.",
            category=LightningDeprecationWarning,
            stacklevel=4,
        )
    for hook in TRANSFER:
        if trainer._datamodule_overrides(hook) and is_overridden(hook, module, LightningModule):
            warnings.warn(
                f"Both {name} and {type(trainer._data_owner).__name__} define {hook}; the datamodule's is called.",
                stacklevel=4,
            )


def check_fit(trainer: Trainer, module: LightningModule) -> None:
    """What a fit needs.

    Raises:
        MisconfigurationException: a step or the optimizers are missing, or options contradict manual optimization.
    """
    name = type(module).__name__
    if not is_overridden("training_step", module, LightningModule):
        raise MisconfigurationException(
            f"{name} defines no training_step(self, batch, batch_idx); trainer.fit() needs one that returns the loss."
        )
    if _takes(module.training_step, "optimizer_idx"):
        raise MisconfigurationException(
            f"{name}.training_step takes `optimizer_idx`, which Lightning 1.x passed: for several optimizers set "
            f"self.automatic_optimization = False and step each one in training_step(self, batch, batch_idx)."
        )
    if module.automatic_optimization:
        if not is_overridden("configure_optimizers", module, LightningModule):
            raise MisconfigurationException(
                f"{name} defines no configure_optimizers(self); return an optimizer from it, for example "
                f"torch.optim.AdamW(self.parameters())."
            )
        return
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) has no effect in manual optimization; leave it "
            f"out and call self.clip_gradients(optimizer, ...) before optimizer.step()."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) has no effect in manual optimization; "
            f"leave it out and step the optimizer every so many batches in training_step."
        )


def warn_of_half_a_validation(trainer: Trainer, module: LightningModule) -> None:
    """Data to validate on and no step for it, or the other way round."""
    has_step = is_overridden("validation_step", module, LightningModule)
    has_data = trainer._defines_loader("val_dataloader")
    if has_data and not has_step:
        warnings.warn(
            f"There is validation data, and {type(module).__name__} defines no validation_step(self, batch, "
            f"batch_idx): nothing is validated.",
            stacklevel=4,
        )
    elif has_step and not has_data:
        warnings.warn(
            f"{type(module).__name__} defines validation_step, and there is no validation data: nothing is validated. "
            f"Pass val_dataloaders, a datamodule, or define val_dataloader().",
            category=PossibleUserWarning,
            stacklevel=4,
        )


def _takes(function: Any, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled or built-in: no signature to read
        return False
