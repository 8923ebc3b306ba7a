"""Gradients that travel in 16 bits: against their float64 mean, and the same bits in every process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from lit_fast.distributed.buckets import GradientBuckets
from lit_fast.distributed.learning import BucketSizes

pytestmark = pytest.mark.dist


def reduced(wire: str | None, backwards: int) -> Any:
    """The last of some backwards' own and reduced gradients, with several small buckets."""
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 70), nn.Tanh(), nn.Linear(70, 1))
    params = [p for name, p in net.named_parameters()]
    group = dist.group.WORLD
    dtype = None if wire is None else getattr(torch, wire)
    buckets = GradientBuckets(params, group, sizes=BucketSizes(4_000, 30_000), wire_dtype=dtype)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for _ in range(backwards):
        x = torch.randn(6, 40, generator=generator)
        for p in params:
            p.grad = None
        net(x).square().mean().backward()
        own = [p.grad.clone() for p in params]
        for p in params:
            p.grad = None
        buckets.begin()
        net(x).square().mean().backward()
        buckets.finish()
    dist.barrier()
    return len(buckets.buckets), own, [p.grad.clone() for p in params]


@pytest.mark.parametrize("wire,bits", [(None, 24), ("float32", 24), ("bfloat16", 8), ("float16", 11)])
def test_means_are_those_of_float64(wire: str | None, bits: int) -> None:
    ranks = run_ranks(reduced, 3, wire, 3)
    assert ranks[0][0] >= 3  # buckets
    for parameter in range(len(ranks[0][1])):
        own = torch.stack([rank[1][parameter].double() for rank in ranks])
        mean = own.mean(0)
        # Each addend is rounded when it is packed, the sum when it is sent back; 1/3 and the sum in float32.
        bound = 2.0**-bits * (own.abs().sum(0) / 3 + mean.abs()) + 6 * 2.0**-24 * own.abs().sum(0)
        bound += 2.0**-24 if wire == "float16" else 0.0  # what is small there is rounded to multiples of that
        for rank in ranks:
            assert torch.equal(rank[2][parameter], ranks[0][2][parameter])
            assert ((rank[2][parameter].double() - mean).abs() <= bound).all()
