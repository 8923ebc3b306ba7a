"""Fine-tuning callbacks, where we go further than Lightning, and what they refuse (else: test_callback_programs)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_programs import Names, make_module, make_trainer
from torch import nn

from lit_fast.callbacks import BackboneFinetuning, BaseFinetuning
from lit_fast.errors import MisconfigurationException

NAMES = Names("lit_fast.pytorch")


def test_a_resumed_run_trains_the_unfrozen_backbone_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt_path: str | None = None) -> tuple[Any, Any]:
        torch.manual_seed(3)
        module = make_module(NAMES)
        callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        trainer = make_trainer(NAMES, str(tmp_path), callbacks=callback, max_epochs=epochs)
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, module

    _, whole = fit(4)
    trainer, first = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    trainer, second = fit(4, str(tmp_path / "two.ckpt"))
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates
    assert all(p.requires_grad for p in second.parameters())


def test_groups_that_join_in_a_run_stay_in_the_compiled_step(tmp_path: Path) -> None:
    module = make_module(NAMES)
    trainer = make_trainer(NAMES, str(tmp_path), callbacks=BackboneFinetuning(unfreeze_backbone_at_epoch=1))
    before = module.backbone[0].weight.detach().clone()
    trainer.fit(module)
    (adopted,) = trainer.fit_loop.plans.binding.stepping.adopted
    assert adopted.compiled and len(trainer.optimizers[0].param_groups) == 2
    assert not torch.equal(before, module.backbone[0].weight)
    adopted.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_equal_parameters_are_not_taken_for_the_same_one() -> None:
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    BaseFinetuning.unfreeze_and_add_param_group(second, optimizer)
    assert [p.shape for p in optimizer.param_groups[1]["params"]] == [(3,), (3,)]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01)
    with pytest.warns(UserWarning, match="2 of 2 parameters are in a group of SGD already"):
        BaseFinetuning.unfreeze_and_add_param_group(first, optimizer)
    assert len(optimizer.param_groups) == 2


def test_a_module_without_a_backbone_is_refused(tmp_path: Path) -> None:
    module = make_module(NAMES)
    module.body = module.backbone
    del module.backbone
    with pytest.raises(MisconfigurationException, match=r"module\.backbone"):
        make_trainer(NAMES, str(tmp_path), callbacks=BackboneFinetuning()).fit(module)


def test_a_subclass_must_say_what_it_freezes(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="freeze_before_training"):
        make_trainer(NAMES, str(tmp_path), callbacks=BaseFinetuning()).fit(make_module(NAMES))


def test_verbose_logs_both_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=True, rounding=3)
    logger = logging.getLogger("lit_fast.callbacks.finetuning")
    with caplog.at_level(logging.INFO, logger=logger.name):
        logger.addHandler(caplog.handler)
        make_trainer(NAMES, str(tmp_path), callbacks=callback, max_epochs=3).fit(make_module(NAMES))
        logger.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records if "backbone lr" in record.getMessage()]
    assert list(dict.fromkeys(said)) == ["Epoch 1: lr 0.05, backbone lr 0.005", "Epoch 2: lr 0.05, backbone lr 0.01"]


def test_a_bare_state_of_an_old_file_is_read() -> None:
    callback = BaseFinetuning()
    callback.load_state_dict({0: [{"params": ["head.weight"], "lr": 0.1}]})
    assert callback.state_dict() == {"internal_optimizer_metadata": {0: [{"params": ["head.weight"], "lr": 0.1}]}}
