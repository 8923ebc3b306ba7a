"""Buckets that are laid out as the first backwards tell: their order, and where measured buckets end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from benchmarks import simulated_network
from benchmarks.exposed_communication import SCALE, Gradient, TimedBackward
from benchmarks.simulated_network import INSTANT, Network, SimulatedGroup
from lit_fast.distributed import learning, timing
from lit_fast.distributed.buckets import GradientBuckets
from lit_fast.distributed.learning import TIMED, BucketSizes

EACH = 10_000  # elements of a gradient
SPACING = 8e-3  # s between two of them


@pytest.fixture
def group() -> Iterator[SimulatedGroup]:
    with simulated_network.joined(2, INSTANT) as joined:
        yield joined


def timed_backward() -> TimedBackward:
    return TimedBackward([Gradient(f"p{index}", EACH * SCALE, SPACING * (index + 1)) for index in range(6)])


def backward(timed: TimedBackward, buckets: GradientBuckets) -> None:
    for parameter in timed.model.parameters():
        parameter.grad = None
    loss = timed.model(timed.x)
    buckets.begin()
    loss.backward()
    buckets.finish()


def layout(buckets: GradientBuckets) -> list[list[int]]:
    return [bucket.members for bucket in buckets.buckets]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        # A collective takes longer than all of backward: one.
        (Network("far", bandwidth=1e12, base=0.08, step=0.0, tree_step=1.0), [[5, 4, 3, 2, 1, 0]]),
        # 4 ms for a gradient, 8 ms between two: only the last one's own may be left, and no bucket waits for another.
        (Network("narrow", bandwidth=1e7, base=1e-5, step=0.0, tree_step=1.0), "the last one alone"),
    ],
    ids=["far", "narrow"],
)
def test_what_the_link_and_backward_ask_for(group: SimulatedGroup, network: Network, expected: object) -> None:
    timed = timed_backward()
    buckets = GradientBuckets(list(timed.model.parameters()), None)
    for number in range(1 + TIMED):
        group.network = network if number == TIMED else INSTANT  # only the probes need it
        backward(timed, buckets)
        assert layout(buckets) == [[5, 4, 3, 2, 1, 0]]  # registered in the other order, less than 1 MiB
    backward(timed, buckets)
    if expected == "the last one alone":
        assert layout(buckets)[-1] == [0] and list(chain(*layout(buckets))) == [5, 4, 3, 2, 1, 0]
    else:
        assert layout(buckets) == expected
    assert all(parameter.grad.eq(1).all() for parameter in timed.model.parameters())


@pytest.mark.parametrize("faster", [True, False])
@mock.patch.object(learning, "processor_moves_bytes", return_value=True)
def test_where_the_processor_moves_bytes_buckets_are_kept_if_they_are_faster(
    _: mock.Mock, group: SimulatedGroup, faster: bool
) -> None:
    narrow = Network("narrow", bandwidth=1e7, base=1e-5, step=0.0, tree_step=1.0)
    far = Network("far", bandwidth=1e12, base=0.03, step=0.0, tree_step=1.0)
    timed = timed_backward()
    buckets = GradientBuckets(list(timed.model.parameters()), None)
    group.network = narrow
    for _ in range(1 + TIMED):
        backward(timed, buckets)
    group.network = narrow if faster else far
    tried = []
    for _ in range(TIMED):
        backward(timed, buckets)
        tried.append(layout(buckets))
    backward(timed, buckets)
    assert len(tried[0]) > 1 and tried == [tried[0]] * TIMED
    assert layout(buckets) == (tried[0] if faster else [[5, 4, 3, 2, 1, 0]])
    assert buckets._learning is None


def test_sizes_that_are_given_stay(group: SimulatedGroup) -> None:
    timed = timed_backward()
    sizes = BucketSizes(first=4 * EACH, rest=2 * 4 * EACH + 64)
    buckets = GradientBuckets(list(timed.model.parameters()), None, sizes=sizes)
    with mock.patch.object(timing, "measure_link", side_effect=AssertionError):
        for _ in range(3 + TIMED):
            backward(timed, buckets)
    assert layout(buckets) == [[5], [4, 3], [2, 1], [0]]


def test_deterministic_algorithms_measure_nothing(group: SimulatedGroup) -> None:
    timed = timed_backward()
    torch.use_deterministic_algorithms(True)
    try:
        buckets = GradientBuckets(list(timed.model.parameters()), None)
    finally:
        torch.use_deterministic_algorithms(False)
    group.transfers.clear()
    for _ in range(3 + TIMED):
        backward(timed, buckets)
    assert [transfer.kind for transfer in group.transfers].count("broadcast") == 1  # of the order
    assert layout(buckets) == [[5, 4, 3, 2, 1, 0]]


def mixed_model() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(64, 64, dtype=torch.bfloat16 if index % 2 else torch.float32) for index in range(6)]
    layers.append(nn.Linear(2, 2))  # never used
    return nn.ModuleList(layers)


def rank_by_rank(steps: int) -> tuple[list[list[list[int]]], bool]:
    dist.init_process_group("gloo")
    model = mixed_model()
    buckets = GradientBuckets(list(model.parameters()), None)
    seen, right = [], True
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = None
        buckets.begin()
        if step != 2 or dist.get_rank() == 0:  # a process without a loss takes part all the same
            x = torch.full((2, 64), float(dist.get_rank() + 1))
            for layer in list(model)[:-1]:
                x = layer(x.to(layer.weight.dtype))
            x.sum().backward()
        buckets.finish()
        seen.append(layout(buckets))
        right = right and all(p.grad is None for p in model[-1].parameters())
        shared = model[0].weight.grad.clone()
        dist.broadcast(shared, 0)
        right = right and torch.equal(shared, model[0].weight.grad)
    dist.barrier()
    dist.destroy_process_group()
    return seen, right


@pytest.mark.dist
def test_all_processes_have_the_same_buckets() -> None:
    (one, right), (other, other_right) = run_ranks(rank_by_rank, 2, 4 + 2 * TIMED)
    assert one == other and right and other_right
    for buckets in one:
        assert sorted(chain(*buckets)) == list(range(14))
        assert all(len({index // 2 % 2 for index in members}) == 1 for members in buckets)  # of one dtype
    assert one[-1] == one[-2]
