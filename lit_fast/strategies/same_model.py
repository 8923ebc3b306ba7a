"""Whether a model can be trained by several processes: the same on all of them, and on one device of each."""

from __future__ import annotations

import hashlib
from itertools import zip_longest
from typing import Any

import torch.distributed as dist
from torch import nn

from lit_fast.errors import ProcessGroupError


def check_same_model(model: nn.Module, group: Any = None) -> None:
    """All ranks of `group` (all there are, where None) must have the same parameters and buffers, in the same order.

    Names, shapes, dtypes and `requires_grad` are compared, values are not. One digest a rank is exchanged; only where
    they differ, two descriptions are.

    Raises:
        ProcessGroupError: the first difference, the same on all ranks.
    """
    lines = describe(model)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    other = next((rank for rank, theirs in enumerate(digests) if theirs != digests[0]), None)
    if other is None:
        return
    both: list[list[str]] = []
    for rank in (0, other):
        said = [lines]
        source = rank if group is None else dist.get_global_rank(group, rank)
        dist.broadcast_object_list(said, src=source, group=group)
        both.append(said[0])
    raise ProcessGroupError(difference(both[0], both[1], other))


def difference(first: list[str], second: list[str], rank: int) -> str:
    """The first line in which the model of `rank` (the second) is not that of rank 0, in words.

    >>> print(difference(["parameter w: shape (2,)"], ["parameter w: shape (3,)", "parameter b: shape (3,)"], 1))
    The model of rank 1 differs from that of rank 0. First at entry 0: rank 0 has parameter w: shape (2,); rank 1 has \
parameter w: shape (3,). Rank 0 has 1 entries, rank 1 has 2. Build the same model, in the same order, on every rank: \
nothing in it may depend on the rank, on this rank's data, or on unseeded random numbers.
    """
    number, (ours, theirs) = next(
        (number, pair) for number, pair in enumerate(zip_longest(first, second, fillvalue="none")) if pair[0] != pair[1]
    )
    return (
        f"The model of rank {rank} differs from that of rank 0. First at entry {number}: rank 0 has {ours}; rank "
        f"{rank} has {theirs}. Rank 0 has {len(first)} entries, rank {rank} has {len(second)}. Build the same model, "
        f"in the same order, on every rank: nothing in it may depend on the rank, on this rank's data, or on unseeded "
        f"random numbers."
    )


def describe(model: nn.Module) -> list[str]:
    """A line for each parameter and buffer, in their order.

    >>> describe(nn.Linear(2, 1, bias=False))
    ['parameter weight: shape (1, 2), torch.float32, requires_grad=True']
    """
    return [
        f"parameter {name}: shape {tuple(p.shape)}, {p.dtype}, requires_grad={p.requires_grad}"
        for name, p in model.named_parameters()
    ] + [f"buffer {name}: shape {tuple(b.shape)}, {b.dtype}" for name, b in model.named_buffers()]


def check_one_device(model: nn.Module) -> None:
    """A strategy that gives each process one device needs all parameters there.

    Raises:
        ProcessGroupError: parameters lie on several devices; names the first of each.
    """
    first: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(str(parameter.device), name)
    if len(first) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in first.items())
        raise ProcessGroupError(
            f"The model's parameters lie on {len(first)} devices: {where}. This strategy gives each process one "
            f"device: leave the model where it is built, and the strategy moves it; a model that is to be split over "
            f"devices needs strategy='fsdp2' or ModelParallelStrategy."
        )
