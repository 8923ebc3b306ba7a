"""Parameters in flat memory over several ranks: who keeps what, gradients' means, and when a gather is waited for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.distributed.learning import BucketSizes
from lit_fast.distributed.sharded_optimizer import ShardedOptimizer
from lit_fast.distributed.shards import FlatBucket, GradientShards, lay_out

pytestmark = pytest.mark.dist

CHUNK = ops.square_chunk()
SMALL = BucketSizes(1 << 10, 1 << 20)


def joined() -> tuple[int, int]:
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def model() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300), nn.Linear(300, 5, bias=False))
    layers[0].weight.data = layers[0].weight.data.t().contiguous().t()  # dense, in another order
    return layers


def flat(layers: nn.Module, sizes: BucketSizes = SMALL) -> list[FlatBucket]:
    names, params = zip(*layers.named_parameters(), strict=True)
    return lay_out(params, names, dist.group.WORLD, sizes)


def memory_order(p: Tensor) -> Tensor:
    return torch.as_strided(p.detach(), (p.numel(),), (1,))


# ---- who keeps what ----


def places_of_parts() -> Any:
    rank, world = joined()
    layers = model()
    before = copy.deepcopy(layers)
    owned: dict[str, list[tuple[int, int]]] = {}
    for bucket in flat(layers):
        for part in bucket.parts:
            owned.setdefault(bucket.names[part.slot], []).append((part.begin, part.length))
            assert part.begin % CHUNK == 0 and 0 <= part.rank < world
            if part.rank == rank:
                whole = memory_order(bucket.params[part.slot])
                shard = bucket.shards[bucket.own.index(part)]
                assert torch.equal(shard, whole[part.begin : part.begin + part.length])
                assert shard.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    for (name, p), q in zip(layers.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()
        runs = sorted(owned[name])
        assert [begin for begin, _ in runs] == [sum(n for _, n in runs[:i]) for i in range(len(runs))]
        assert sum(length for _, length in runs) == p.numel()
    return owned


def test_every_element_is_kept_once_and_the_model_is_as_before() -> None:
    results = run_ranks(places_of_parts, 3)
    assert results[0] == results[1] == results[2]
    assert len(results[0]["0.weight"]) > 1  # one of them is cut


# ---- gradients ----


def means(wire: Any) -> Any:
    rank, world = joined()
    layers = model()
    layers[2].requires_grad_(False)
    homes = flat(layers)
    for home in homes:
        home.sends = any(p.requires_grad for p in home.params)
    sent = [home for home in homes if home.sends]
    shards = GradientShards(sent, dist.group.WORLD, wire_dtype=wire)
    grads = {name: [torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * r + i)) for r in range(world)]
             for i, (name, p) in enumerate(layers.named_parameters())}  # fmt: skip
    unused, alone = "1.bias", "0.bias"  # the one has no gradient anywhere, the other in the first rank alone
    for step in range(3):
        shards.begin()
        loss = torch.zeros(())
        for name, p in layers.named_parameters():
            if name not in (unused, alone) or (name == alone and rank == 0):
                loss = loss + (p * grads[name][rank]).sum()
        loss.backward()
        shards.finish()
        for home in sent:
            assert all(p.grad is None for p in home.params)
            for part, shard in zip(home.own, home.shards, strict=True):
                name = home.names[part.slot]
                if name == unused:
                    assert shard.grad is None
                    continue
                whole, p = torch.zeros(grads[name][0].shape), home.params[part.slot]
                for r in range(1 if name == alone else world):
                    whole += (grads[name][r] / world).to(wire or torch.float32).float()
                expected = memory_order(torch.empty_like(p).copy_(whole))[part.begin : part.begin + part.length]
                assert torch.equal(shard.grad, expected * (step + 1 if step < 2 else 1))
        if step == 1:  # those of the first two backwards were added up
            for home in sent:
                for shard in home.shards:
                    shard.grad = None
    return [name for home in homes if not home.sends for name in home.names]


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_each_rank_gets_its_part_of_the_mean_summed_in_float32(wire: Any) -> None:
    assert run_ranks(means, 2, wire) == [["2.weight"]] * 2  # which is frozen, and not sent


# ---- the gather ----


def hidden_gather() -> Any:
    rank, _ = joined()
    layers = model()
    [first, *rest] = flat(layers, BucketSizes(1 << 30, 1 << 30))
    assert not rest
    waits = []
    touches: list[Any] = [
        lambda: layers(torch.ones(2, 300)),
        lambda: layers[0].weight + 1.0,
        layers.state_dict,
        lambda: layers[1].bias.data,
        lambda: copy.deepcopy(layers),
        lambda: nn.functional.linear(torch.ones(1, 300), layers[2].weight),
        lambda: torch._foreach_norm(list(layers.parameters())),
        lambda: layers[0].weight.grad,
    ]
    for number, touch in enumerate(touches):
        for shard in first.shards:
            shard.data.fill_(10.0 * number + rank)
        versions = [p._version for p in first.params]
        first.gather(hidden=True)
        for home in first.params:
            assert isinstance(home, Parameter)
        waits.append(first.work is not None)
        touch()
        assert first.work is None and {type(p) for p in layers.parameters()} == {Parameter}
        assert all(p._version > before for p, before in zip(first.params, versions, strict=True))
        values = torch.cat([memory_order(p) for p in layers.parameters()]).unique().tolist()
        assert values == [10.0 * number, 10.0 * number + 1.0]
    return waits


def test_whoever_uses_a_parameter_first_waits_for_it() -> None:
    assert run_ranks(hidden_gather, 2) == [[True] * 8] * 2


# ---- the norm ----


def norms() -> Any:
    joined()
    layers = model()
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for i, p in enumerate(layers.parameters()):
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    whole = ops.gradient_norm(optimizer.param_groups, 0.25)
    of_sizes = []
    for size in (1 << 10, 1 << 30):
        again = copy.deepcopy(layers)
        for p, q in zip(again.parameters(), layers.parameters(), strict=True):
            p.grad = q.grad
        optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
        names = {p: name for name, p in again.named_parameters()}
        sharded = ShardedOptimizer(optimizer, lambda names=names: names, dist.group.WORLD, BucketSizes(size, size))
        shards = GradientShards(sharded.buckets, dist.group.WORLD)
        shards.begin()
        shards.finish()
        of_sizes.append(sharded.norm(0.25))
    return whole, of_sizes


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_norm_has_the_cores_bits(world: int) -> None:
    for whole, of_sizes in run_ranks(norms, world):
        assert whole > 10.0 and all(torch.equal(whole, norm) for norm in of_sizes)
