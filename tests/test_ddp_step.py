"""What our buckets add to a backward, in calls, which no load of the machine changes; and how steps are timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from benchmarks import ddp_step
from benchmarks.ddp_step import UNTIMED, Batches


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_two_operators_and_a_kernel_for_150_parameters(group_of_one: None) -> None:
    steps = ddp_step.reducers("150 parameters")
    for step in steps.values():
        for _ in range(3):  # the order of arrival is known then
            step()
    counts = {name: ddp_step.operators(step) for name, step in steps.items()}
    assert counts["ours"] - counts["nothing"] <= 2  # and the core's own kernel, once a bucket
    assert counts["torch DDP"] - counts["nothing"] > 150


def test_a_step_is_timed_between_two_batches() -> None:
    data = Batches([torch.zeros(1), torch.ones(1)], steps=4)
    seen = list(data)
    assert len(seen) == len(data) == UNTIMED + 5 and len(data.stamps) == 2
    assert [batch.item() for batch in seen[:3]] == [0.0, 1.0, 0.0]
    assert data.step.wall >= 0


@pytest.mark.parametrize("model", ddp_step.MODELS)
def test_models_train_on_their_batches(model: str) -> None:
    module, batches = ddp_step.make(model)
    again, _ = ddp_step.make(model)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert model != "150 parameters" or len(list(module.parameters())) == 150
    module.log = lambda *_, **__: None
    module.training_step(batches[0], 0).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
