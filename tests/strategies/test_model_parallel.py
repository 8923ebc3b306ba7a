"""`ModelParallelStrategy`: a mesh of data and tensor parallel, laid out by the module."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lit_fast
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies import ModelParallelStrategy
from lit_fast.strategies.choosing import choose_strategy

dist_test = pytest.mark.dist


class Net(lit_fast.LightningModule):
    def __init__(self, split: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.split = split
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.seen: list[float] = []

    def configure_model(self) -> None:
        if self.split and not isinstance(self.up.weight, DTensor):
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            parallelize_module(
                self, self.device_mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += batch[0][:, 0].tolist()
        return self.down(torch.tanh(self.up(batch[0]))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(strategy: Any, world: int, split: bool) -> Any:
    torch.manual_seed(5)
    data = torch.randn(16, 6)
    data[:, 0] = torch.arange(16.0)
    model = Net(split)
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_epochs=2, logger=False, gradient_clip_val=0.1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(data), batch_size=2))
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.state_dict().items()}
    return model.seen, {name: p.detach().clone() for name, p in weights.items()}, trainer.explain()


def of_four() -> Any:
    return fit(ModelParallelStrategy(data_parallel_size=2), 4, True)


def of_two() -> Any:
    return fit("ddp", int(os.environ["WORLD_SIZE"]), False)


@dist_test
def test_two_times_two_train_as_two_and_share_the_data_between_two() -> None:
    four, two = run_ranks(of_four, 4, timeout=90.0), run_ranks(of_two, 2)
    for rank, (seen, weights, explained) in enumerate(four):
        expected_seen, expected, _ = two[rank // 2]
        assert seen == expected_seen
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)
        assert "on this process's parts" in explained


def strategy_for(world: int, **sizes: Any) -> ModelParallelStrategy:
    strategy = choose_strategy(ModelParallelStrategy(**sizes), [torch.device("cpu")] * world, 1, None)
    strategy.world_size = world
    assert isinstance(strategy, ModelParallelStrategy)
    return strategy


def test_sizes() -> None:
    assert strategy_for(4).sizes() == (1, 4)  # as in Lightning: one machine is one tensor-parallel group
    assert strategy_for(4, data_parallel_size=2).sizes() == (2, 2)
    assert strategy_for(4, tensor_parallel_size=1).sizes() == (4, 1)
    with pytest.raises(MisconfigurationException, match="must multiply to the number of processes, 4; here they are 3"):
        strategy_for(4, data_parallel_size=3, tensor_parallel_size=2).sizes()


def test_a_module_that_splits_nothing_is_refused() -> None:
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=1, strategy="model_parallel", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=1,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="Net has no parameter that is split"):
        trainer.fit(Net(split=False), [(torch.randn(2, 6),)])
