"""What `lit_fast/flat.py` does, by torch's own operations: for GPUs that the core was not built for.

The same bits but for the order within one partial sum of squares, and many launches where the core has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_fast.errors import KernelError


def pack(
    params: Sequence[Tensor],
    pieces: Sequence[tuple[int, int, int, int]],
    used_flags: Sequence[Sequence[int]],
    names: Sequence[str],
    out: Tensor,
    scale: float,
    aside: Sequence[Tensor | None] | None,
    release: bool,
) -> list[int]:
    """See `lit_fast.flat.Packer.pack`."""
    sums: list[Tensor | None] = []
    for slot, p in enumerate(params):
        name = f"Parameter {slot} of the bucket" + (f" ({names[slot]})" if names else "")
        given = [x for x in (None if aside is None else aside[slot], p.grad) if x is not None]
        for x in given:
            if x.layout != torch.strided or x.device != p.device or x.shape != p.shape or x.stride() != p.stride():
                raise KernelError(
                    f"{name}: its gradient ({x.layout}, shape {tuple(x.shape)}, {x.device}) does not lie in memory as "
                    f"the parameter does (shape {tuple(p.shape)}, {p.device}). A bucket takes dense gradients: an "
                    f"embedding has those with sparse=False."
                )
        sums.append(sum(given[1:], given[0]) if given else None)
    # Before anything is written: a gradient may lie in `out`.
    runs = [
        (wire, count, _scaled(_in_memory_order(found)[begin : begin + count], scale, out.dtype))
        for slot, begin, wire, count in pieces
        if (found := sums[slot]) is not None
    ]
    out.zero_()
    for wire, count, values in runs:
        out[wire : wire + count] = values
    places = [place for found, flags in zip(sums, used_flags, strict=True) if found is not None for place in flags]
    if places:
        out[torch.tensor(places, device=out.device)] = 1.0
    if release:
        for p in params:
            p.grad = None
    return [slot for slot, found in enumerate(sums) if found is None]


def unpack(flat_in: Tensor, flat_out: Tensor, scale: float) -> None:
    flat_out.copy_(_scaled(flat_in, scale, flat_out.dtype))


def sum_pieces(pieces: Tensor, out: Tensor, scale: float) -> None:
    total = pieces[0].float()
    for piece in pieces[1:]:
        total = total + piece.float()
    out.copy_(_scaled(total, scale, out.dtype))


def squares(values: Sequence[Tensor], places: Sequence[int], partials: Tensor, chunk: int) -> None:
    """Each chunk apart: a sum over several rows may take an order that depends on their number."""
    for x, place in zip(values, places, strict=True):
        flat = _in_memory_order(x)
        for k in range(-(-x.numel() // chunk)):
            partials[place + k] = flat[k * chunk : (k + 1) * chunk].double().square().sum()


def norm_of(partials: Tensor, grad_scale: float | Tensor) -> Tensor:
    factor = grad_scale.abs() if isinstance(grad_scale, Tensor) else abs(grad_scale)
    return (partials.sum().sqrt() * factor).float()


def _in_memory_order(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))


def _scaled(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale).to(dtype)
