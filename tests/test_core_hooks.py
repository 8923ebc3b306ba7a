"""The hooks that modules and datamodules share, as Lightning has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heart_models import Plain

import lit_fast
from lit_fast.core_hooks import CheckpointHooks, DataHooks, ModelHooks
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import HOOKS
from lit_fast.pytorch.functions import is_overridden

# hooks whose empty form is LightningModule's own, and those that are not called on a module
IN_THE_MODULE = {
    "backward", "clip_gradients", "configure_callbacks", "configure_gradient_clipping", "configure_optimizers",
    "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad", "predict_step", "test_step", "training_step",
    "validation_step",
}  # fmt: skip


def test_every_hook_of_a_module_has_a_home() -> None:
    of_modules = {name for name, hook in HOOKS.items() if "m" in hook.owners}
    here = {name for room in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(room) if name in HOOKS}
    assert here == of_modules - IN_THE_MODULE
    assert vars(lit_fast.LightningModule).keys() >= IN_THE_MODULE


def test_a_class_between_overrides_and_inheriting_does_not() -> None:
    class Between(Plain):
        def on_train_start(self) -> None: ...

    class Below(Between): ...

    class Data(lit_fast.LightningDataModule):
        def setup(self, stage: str) -> None: ...

    for base in (None, lit_fast.LightningModule, ModelHooks):
        assert is_overridden("on_train_start", Below(), base)
        assert not is_overridden("on_train_end", Below(), base)
    assert is_overridden("setup", Data()) and not is_overridden("teardown", Data(), DataHooks)


@pytest.mark.parametrize("owner", [Plain, lit_fast.LightningDataModule])
def test_what_the_empty_hooks_do(owner: Any) -> None:
    made, batch = owner(), torch.ones(2)
    assert made.on_before_batch_transfer(batch, 0) is made.on_after_batch_transfer(batch, 0) is batch
    assert made.transfer_batch_to_device([batch], torch.device("meta"), 0)[0].device.type == "meta"
    assert made.prepare_data_per_node and not made.allow_zero_length_dataloader_with_multiple_devices
    for name in ("train", "val", "test", "predict"):
        with pytest.raises(MisconfigurationException, match=f"^No .*: {owner.__name__} has no {name}_dataloader; def"):
            getattr(made, f"{name}_dataloader")()


def test_lightnings_name() -> None:
    import lit_fast.pytorch.core.hooks as served

    assert served.ModelHooks is ModelHooks
