"""Every hook of the API in one table: its name, who may define it, and where `self.log` is allowed.

The rows stand in the order in which a fit runs them; facts from Lightning 2.6 (sections 3 to 6 of its public surface).
A new hook is one new row.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class LogRule(NamedTuple):
    """Where a value logged inside a hook may go, and where it goes when the caller does not say."""

    on_step: bool  # default of `on_step`
    on_epoch: bool  # default of `on_epoch`
    step_allowed: bool  # may `on_step=True` be asked for?


STEP = LogRule(on_step=True, on_epoch=False, step_allowed=True)
BATCH = LogRule(on_step=False, on_epoch=True, step_allowed=True)
EPOCH = LogRule(on_step=False, on_epoch=True, step_allowed=False)


class Hook(NamedTuple):
    """One hook: `owners` are the letters of who may define it (c callback, m module, d datamodule)."""

    name: str
    owners: str
    log: LogRule | None = None
    sees_gradients_after_clipping: bool = False


_ROWS = (
    Hook("configure_callbacks", "m"),
    Hook("prepare_data", "dm"),
    Hook("setup", "dcm"),
    Hook("configure_model", "m"),
    Hook("on_load_checkpoint", "cm"),
    Hook("load_state_dict", "cd"),
    Hook("configure_optimizers", "m"),
    Hook("on_fit_start", "cm"),
    Hook("on_sanity_check_start", "c"),
    Hook("on_sanity_check_end", "c"),
    Hook("train_dataloader", "dm"),
    Hook("val_dataloader", "dm"),
    Hook("test_dataloader", "dm"),
    Hook("predict_dataloader", "dm"),
    Hook("on_train_start", "cm", EPOCH),
    Hook("on_train_epoch_start", "cm", EPOCH, True),
    Hook("on_before_batch_transfer", "dm"),
    Hook("transfer_batch_to_device", "dm"),
    Hook("on_after_batch_transfer", "dm"),
    Hook("on_train_batch_start", "cm", STEP, True),
    Hook("training_step", "m", STEP),
    Hook("on_before_zero_grad", "cm", STEP, True),
    Hook("optimizer_zero_grad", "m", STEP, True),
    Hook("on_before_backward", "cm", STEP),
    Hook("backward", "m", STEP),
    Hook("on_after_backward", "cm", STEP),
    Hook("on_before_optimizer_step", "cm", STEP),
    Hook("configure_gradient_clipping", "m", STEP, True),
    Hook("clip_gradients", "m", STEP, True),
    Hook("optimizer_step", "m", STEP, True),
    Hook("lr_scheduler_step", "m", None, True),
    Hook("on_train_batch_end", "cm", STEP, True),
    Hook("on_validation_model_zero_grad", "m", None, True),
    Hook("on_validation_model_eval", "m"),
    Hook("on_validation_start", "cm", EPOCH),
    Hook("on_validation_epoch_start", "cm", EPOCH),
    Hook("on_validation_batch_start", "cm", BATCH),
    Hook("validation_step", "m", BATCH),
    Hook("on_validation_batch_end", "cm", BATCH),
    Hook("on_validation_epoch_end", "cm", EPOCH),
    Hook("on_validation_end", "cm"),
    Hook("on_validation_model_train", "m"),
    Hook("on_train_epoch_end", "cm", EPOCH, True),
    Hook("on_train_end", "cm", None, True),
    Hook("on_fit_end", "cm", None, True),
    Hook("on_test_model_eval", "m"),
    Hook("on_test_start", "cm", EPOCH),
    Hook("on_test_epoch_start", "cm", EPOCH),
    Hook("on_test_batch_start", "cm", BATCH),
    Hook("test_step", "m", BATCH),
    Hook("on_test_batch_end", "cm", BATCH),
    Hook("on_test_epoch_end", "cm", EPOCH),
    Hook("on_test_end", "cm"),
    Hook("on_test_model_train", "m"),
    Hook("on_predict_model_eval", "m"),
    Hook("on_predict_start", "cm"),
    Hook("on_predict_epoch_start", "cm"),
    Hook("on_predict_batch_start", "cm"),
    Hook("predict_step", "m"),
    Hook("on_predict_batch_end", "cm"),
    Hook("on_predict_epoch_end", "cm"),
    Hook("on_predict_end", "cm"),
    Hook("teardown", "dcm"),
    Hook("state_dict", "cd"),
    Hook("on_save_checkpoint", "cm", None, True),
    Hook("on_exception", "cd"),
)

HOOKS: dict[str, Hook] = {row.name: row for row in _ROWS}

# A step that is clipped in registers leaves `p.grad` unclipped: whoever can look afterwards forces the clipped
# gradients to be written back, as Lightning would show them. `training_step` is exempt, and documented so; validation
# hooks see none at all, since gradients are released before validation (unless that hook itself is overridden).
GRADIENT_OBSERVERS = frozenset(row.name for row in _ROWS if row.sees_gradients_after_clipping)


def is_overridden(name: str, owner: object, base: type) -> bool:
    """Whether `owner` (an instance) defines hook `name` itself, on its class or on the instance.

    A mock or a patched instance attribute counts as an override: what is there will be called.
    """
    if name in getattr(owner, "__dict__", {}):
        return True
    own: Any = getattr(type(owner), name, None)
    return own is not None and own is not getattr(base, name, None)
