"""What callbacks ask a strategy for, on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, trainer

import lit_fast
from lit_fast.strategies import SingleDeviceStrategy


def test_collectives_are_the_identity() -> None:
    strategy, tensor = SingleDeviceStrategy("cpu"), torch.arange(3.0)
    assert strategy.broadcast("x", src=0) == "x"
    assert strategy.reduce(tensor, reduce_op="sum") is tensor and strategy.all_gather(tensor) is tensor
    assert strategy.reduce_boolean_decision(False) is False
    strategy.barrier("here")
    assert (strategy.world_size, strategy.global_rank, strategy.is_global_zero) == (1, 0, True)
    assert strategy.root_device == torch.device("cpu")


def test_batches_without_a_module() -> None:
    batch = {"x": torch.ones(2), "name": "a"}
    assert SingleDeviceStrategy("cpu").batch_to_device(batch)["x"] is batch["x"]
    assert SingleDeviceStrategy("cpu").batch_to_device(batch, torch.device("meta"))["x"].device.type == "meta"


def test_what_a_callback_finds_in_a_fit() -> None:
    class Looks(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            strategy = trainer.strategy
            assert strategy.model is strategy.lightning_module is pl_module is trainer.lightning_module
            assert strategy.optimizers is trainer.optimizers
            assert strategy.lr_scheduler_configs is trainer.lr_scheduler_configs
            assert strategy.precision_plugin is trainer.precision_plugin and trainer.scaler is None
            state = strategy.optimizer_state(trainer.optimizers[0])
            assert state["param_groups"] == trainer.optimizers[0].state_dict()["param_groups"]
            assert strategy.lightning_module_state_dict().keys() == pl_module.state_dict().keys()

    class Transfers(Plain):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch * 2

    model = Transfers()
    made = fitted(model, batches(1), max_epochs=1, callbacks=Looks())
    assert torch.equal(made.strategy.batch_to_device(torch.ones(2)), torch.full((2,), 2.0))
    checkpoint = {"state_dict": Plain().state_dict(), "optimizer_states": [made.optimizers[0].state_dict()]}
    made.strategy.load_model_state_dict(checkpoint)
    made.strategy.load_optimizer_state_dict(checkpoint)
    assert torch.equal(model.net[0].weight, Plain().net[0].weight)


@pytest.mark.parametrize(
    "precision,dtype",
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_modules_are_made_in_the_dtype_of_the_precision(precision: str, dtype: torch.dtype) -> None:
    with trainer(precision=precision).init_module():
        made = torch.nn.Linear(2, 2)
    assert (made.weight.dtype, torch.get_default_dtype()) == (dtype, torch.float32)


def test_modules_are_made_on_the_device_of_the_trainer() -> None:
    made = trainer()
    made.strategy.root_device = torch.device("meta")
    with made.init_module():
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_weights_that_are_loaded_next_need_no_values() -> None:
    def made(empty: bool | None) -> torch.nn.Module:
        torch.manual_seed(3)
        with trainer().init_module(empty_init=empty):
            return torch.nn.Linear(4, 4)

    torch.manual_seed(3)
    usual, drawn = torch.nn.Linear(4, 4), torch.get_rng_state()
    assert torch.equal(made(False).weight, usual.weight) and torch.equal(made(None).weight, usual.weight)
    made(True)
    assert not torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(3).get_state())
    with trainer().init_module(empty_init=True):
        kept = torch.full((3,), 7.0)
        assert torch.nn.init.constant_(kept, 5.0) is kept and torch.nn.init.constant_(tensor=kept, val=5.0) is kept
    assert kept.tolist() == [7.0, 7.0, 7.0]
