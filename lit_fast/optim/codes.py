"""8-bit codes of moments, and 16-bit remainders, in torch operations: what turns a state into another form with.

The kernels' own conversions, which are the definition, are in csrc/formulas/storage.h. Those here run when a state is
loaded, saved for torch, or asked for in another form; they are the same functions of the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_BLOCK = 256  # codes that share a scale, in the order of memory
NEAREST = 0x80000  # the chance of half a code: rounds to nearest
UNSIGNED = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"))  # sums of squares; other moments have signs
_DROPPED = 0xFFFFF  # the bits of a float32 that a code has not
_LEAST_OF_BLOCK = 0x03800000  # float32 bits of 2^-120; a block below it is zero
_LARGEST_SCALE = 253 << 23  # of 2^126
_INFINITY = 255 << 23
_OFFSET = {True: (127 - 15) << 3, False: (127 - 31) << 3}  # of the codes in a float32's upper 12 bits, by signed


def encode(values: Tensor, signed: bool, chance: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """Codes (uint8, laid out like `values`) and scales (float32, one for each 256 codes in the order of memory).

    Args:
        values: dense, of any floating dtype.
        signed: whether a bit is spent on the sign.
        chance: 20 random bits for each value in the order of memory, or one for all: a code is rounded up when what
            it drops of the value, in units of 2^-20 of a code, and this make 2^20 or more.

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
    scale = _scale_of(largest.long())
    inverse = _inverse_of(scale)
    scaled = (blocks * inverse[:, None]).view(-1)[: values.numel()]
    bits = row.view(torch.int32).long() & 0xFFFFFFFF
    steps = (((scaled.view(torch.int32).long() & 0x7FFFFFFF) + chance) >> 20) - _OFFSET[signed]
    if signed:
        flat = steps.clamp(0, 127) | (bits >> 24) & 128  # the value's own sign: an infinite one, scaled, is a NaN
    else:
        least = ((bits + chance) >> 20).clamp(0, 1)  # what is not zero stays so: its root divides
        kept = (inverse > 0.0).repeat_interleave(CODE_BLOCK)[: values.numel()]
        flat = torch.maximum(steps, least * kept).clamp(0, 255)
    codes = torch.empty_like(values, dtype=torch.uint8)
    in_memory_order(codes).copy_(flat)
    return codes, scale


def _scale_of(largest: Tensor) -> Tensor:
    """The scales (float32) of blocks whose largest magnitudes have these bits (int64)."""
    power = ((largest + _DROPPED) & _INFINITY).clamp(max=_LARGEST_SCALE)
    bits = torch.where(largest < _LEAST_OF_BLOCK, 0, torch.where(largest < _INFINITY, power, largest))
    return bits.int().view(torch.float32)


def _inverse_of(scale: Tensor) -> Tensor:
    bits = scale.view(torch.int32)
    ordinary = (bits > 0) & (bits <= _LARGEST_SCALE)
    return torch.where(ordinary, (254 << 23) - bits, 0).view(torch.float32)


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The float32 values of codes, laid out like them."""
    flat = in_memory_order(codes).to(torch.int32)
    magnitude = flat & 127 if signed else flat
    bits = torch.where(magnitude == 0, 0, (magnitude + _OFFSET[signed]) << 20)
    if signed:
        bits = bits | ((flat & 128) << 24)
    units = bits.view(torch.float32)
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
