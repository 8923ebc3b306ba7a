"""What callbacks ask a strategy for, on one device."""

from __future__ import annotations

from typing import Any

import torch
from heart_models import Plain, batches, fitted

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
