"""The simulated network: what its collectives leave in tensors, and when; torch's own DDP runs on it."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import simulated_network
from benchmarks.simulated_network import INSTANT, NETWORKS, Network, SimulatedGroup

RANKS = 4
SLOW = Network("slow", bandwidth=1e9, base=1e-3, step=0.5e-3, tree_step=1.0)


@pytest.fixture
def group() -> Iterator[SimulatedGroup]:
    with simulated_network.joined(RANKS, INSTANT) as joined:
        yield joined


def test_all_ranks_hold_what_this_one_holds(group: SimulatedGroup) -> None:
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, RANKS, "simulated")
    results = {}
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        tensor = torch.tensor([1.0, 3.0])
        dist.all_reduce(tensor, op)
        results[op] = tensor.tolist()
    assert list(results.values()) == [[4.0, 12.0], [1.0, 3.0], [1.0, 3.0], [1.0, 81.0]]

    given = torch.arange(8.0)
    whole, part = torch.empty(32), torch.empty(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the names of torch before 2.13
        dist.all_gather_into_tensor(whole, given)
        dist.reduce_scatter_tensor(part, given)
    assert whole.tolist() == 4 * given.tolist() and part.tolist() == [0.0, 4.0]
    parts = [torch.empty(8) for _ in range(RANKS)]
    dist.all_gather(parts, given)
    dist.reduce_scatter(part, list(given.split(2)), op=dist.ReduceOp.AVG)
    assert all(torch.equal(gathered, given) for gathered in parts) and part.tolist() == [0.0, 1.0]
    exchanged = torch.empty(8)
    dist.all_to_all_single(exchanged, given)
    assert exchanged.tolist() == 4 * [0.0, 1.0]

    objects: list[object] = [None] * RANKS
    dist.all_gather_object(objects, {"rank": 0})
    sent = ["seed"]
    dist.broadcast_object_list(sent)
    dist.barrier()
    assert objects == 4 * [{"rank": 0}] and sent == ["seed"]


def test_an_error_is_raised_by_whatever_comes_next() -> None:
    with pytest.raises(NotImplementedError, match="cannot reduce by"), simulated_network.joined(RANKS, INSTANT):
        dist.all_reduce(torch.tensor([1]), dist.ReduceOp.BXOR)
    assert not dist.is_initialized()


def test_times_follow_the_model() -> None:
    # Six steps of 1/4 of 8 MB at 1 GB/s each, and half a millisecond each; then a base of one.
    assert SLOW.all_reduce(8e6, RANKS) == pytest.approx(1e-3 + 6 * (0.5e-3 + 2e-3))
    assert SLOW.half_ring(8e6, RANKS) == pytest.approx(1e-3 + 3 * (0.5e-3 + 2e-3))
    assert SLOW.pipeline(8e6, RANKS) == pytest.approx(1e-3 + 3 * 0.5e-3 + 8e-3)
    assert all(time == 0.0 for time in (SLOW.all_reduce(8e6, 1), SLOW.half_ring(8e6, 1), SLOW.pipeline(8e6, 1)))
    assert all(time == 0.0 for time in (INSTANT.all_reduce(8e6, 64), INSTANT.half_ring(8e6, 64)))
    # Few bytes at many ranks go by the tree, 20 steps instead of 2046; many bytes by the ring.
    ndr = NETWORKS["InfiniBand NDR"]
    assert ndr.all_reduce(1e3, 1024) == pytest.approx(8.4e-6 + 20 * 28e-6 + 2e3 / 45e9)
    assert ndr.all_reduce(4e9, 8) == pytest.approx(8.4e-6 + 14 * (14e-6 + 0.5e9 / 50e9))


def test_the_link_is_serial_and_the_processor_free(group: SimulatedGroup) -> None:
    group.network, group.scale = SLOW, 1e3
    tensors = [torch.ones(2000), torch.ones(500)]  # as 8 MB and 2 MB
    began, spent = time.perf_counter(), time.process_time()
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    issued = time.perf_counter() - began
    works[1].wait()
    took, spent = time.perf_counter() - began, time.process_time() - spent
    first, second = group.transfers
    assert first.due - first.start == pytest.approx(16e-3) and second.due - second.start == pytest.approx(7e-3)
    assert second.start == first.due and (first.nbytes, second.nbytes) == (8000, 2000)
    assert issued < 16e-3 and took >= second.due - first.start >= 23e-3 - 1e-9
    assert first.end >= first.due and second.end >= second.due
    assert spent < took
    assert works[0].is_completed() and tensors[0].eq(RANKS).all()
    assert works[0].get_future().value()[0] is tensors[0]


def test_the_network_changes_between_collectives(group: SimulatedGroup) -> None:
    for network in (SLOW, INSTANT):
        group.network = network
        dist.all_reduce(torch.ones(1))
    assert [math.ceil((t.due - t.start) * 1e3) for t in group.transfers] == [5, 0]


def test_torch_ddp_averages_on_it(group: SimulatedGroup) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    alone = copy.deepcopy(model)
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.04)
    x = torch.randn(8, 64)
    alone(x).sum().backward()
    for _ in range(2):  # torch lays its buckets out anew after the first
        group.transfers.clear()
        model.zero_grad()
        ddp(x).sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # divided by 4 and multiplied by 4: the same bits
    reduced = [transfer.nbytes for transfer in group.transfers if transfer.nbytes > 1000]
    assert len(reduced) > 1 and sum(reduced) == 6 * (64 * 64 + 64) * 4
