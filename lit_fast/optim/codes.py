"""8-bit codes of moments, and 16-bit remainders, in torch operations: what turns a state into another form with.

The kernels' own conversions, which are the definition, are in csrc/formulas/storage.h. Those here run when a state is
loaded, saved for torch, or asked for in another form; they are the same functions of the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_BLOCK = 256  # codes that share a scale, in the order of memory
NEAREST = 0x8000  # the chance of half a code: rounds to nearest
UNSIGNED = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"))  # sums of squares; other moments have signs
_LARGEST_CODE = 1.875  # in units of the scale
_SMALLEST = 0x03800000  # float32 bits of 2^-120; a block below it is zero
_OFFSET = {True: (127 - 15) << 3, False: (127 - 31) << 3}  # of the codes in a float32's upper 12 bits, by signed


def encode(values: Tensor, signed: bool, chance: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """Codes (uint8, laid out like `values`) and scales (float32, one for each 256 codes in the order of memory).

    Args:
        values: dense, of any floating dtype.
        signed: whether a bit is spent on the sign.
        chance: 16 random bits for each value in the order of memory, or one for all: a code is rounded up when what
            it drops of the value, in units of 2^-16 of a code, and this make 2^16 or more.

    Example:
        >>> codes, scale = encode(torch.tensor([1.875, -1.0, 0.0]), signed=True)
        >>> codes, scale
        (tensor([127, 248,   0], dtype=torch.uint8), tensor([1.]))
        >>> decode(codes, scale, signed=True)
        tensor([ 1.8750, -1.0000,  0.0000])
    """
    row = in_memory_order(values).float()
    blocks = _blocks(row)
    largest = blocks.abs().view(torch.int32).amax(1) if len(blocks) else torch.empty(0, dtype=torch.int32)
    magnitude, empty = largest.view(torch.float32), largest < _SMALLEST
    scale = torch.where(empty, 0.0, magnitude / _LARGEST_CODE)
    scaled = (blocks * torch.where(empty, 0.0, _LARGEST_CODE / magnitude)[:, None]).view(-1)[: values.numel()]
    bits = scaled.view(torch.int32).long() & 0xFFFFFFFF
    steps = (((bits & 0x7FFFFFFF) + (chance << 4)) >> 20) - _OFFSET[signed]
    signs = (row.view(torch.int32).long() >> 24) & 128  # of an infinite value too, which scaled is none
    positive = torch.where(scaled > 0.0, steps.clamp(1, 255), 0)  # what is not zero stays so: its root divides
    flat = steps.clamp(0, 127) | signs if signed else positive
    codes = torch.empty_like(values, dtype=torch.uint8)
    in_memory_order(codes).copy_(flat)
    return codes, scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The float32 values of codes, laid out like them."""
    flat = in_memory_order(codes).to(torch.int32)
    magnitude = flat & 127 if signed else flat
    bits = (magnitude + _OFFSET[signed]) << 20
    if signed:
        bits = bits | ((flat & 128) << 24)
    units = torch.where(magnitude == 0, 0.0, bits.view(torch.float32))
    values = torch.empty_like(codes, dtype=torch.float32)
    in_memory_order(values).copy_((_blocks(units) * scale[:, None]).view(-1)[: codes.numel()])
    return values


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 weight and the int16 remainder that keep a float32 one exactly."""
    bits = master.view(torch.int32).long()
    upper = ((bits + 0x8000) >> 16).to(torch.int16)
    remainder = bits.to(torch.int16)
    nan = master.isnan()
    return torch.where(nan, torch.nan, upper.view(torch.bfloat16)), torch.where(nan, 0, remainder)


def rebuilt(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weight that a bfloat16 one and its remainder stand for."""
    return (((weight.view(torch.int16).int()) << 16) + remainder.int()).view(torch.float32)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor's elements as one row, as they lie."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _blocks(row: Tensor) -> Tensor:
    """(n,) as (blocks, 256), the last one filled up with zeros."""
    return torch.nn.functional.pad(row, (0, -row.numel() % CODE_BLOCK)).view(-1, CODE_BLOCK)
