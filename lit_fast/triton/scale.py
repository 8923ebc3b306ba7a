# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Gradients rewritten in place: g <- clamp(g * factor, -limit, limit), see csrc/formulas/scale.h."""

import triton
import triton.language as tl

from lit_fast.triton.table import (
    BFLOAT16,
    BLOCK,
    FIRST_CHUNK,
    GRAD,
    LAYOUT,
    NUMEL,
    load,
    named,
    row_of_chunk,
    scaled_gradient,
    store,
)


@triton.jit
def _scale_block(grad, start, inside, factor, limit, HALF: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    values = scaled_gradient(load(grad, start, inside, HALF, MASKED, ALIGNED), factor, limit)
    store(grad, start, inside, values, HALF, MASKED, ALIGNED)


@triton.jit
def _scale_chunk(grad, begin, count, factor, limit, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _scale_block(grad, begin + start, True, factor, limit, HALF, False, ALIGNED)
    if whole < count:
        inside = tl.arange(0, BLOCK) < count - whole
        _scale_block(grad, begin + whole, inside, factor, limit, HALF, True, ALIGNED)


@triton.jit(do_not_specialize=["rows"], repr=named("scale_kernel"))
def scale_kernel(table, rows, scale, CHUNK: tl.constexpr, ROW_WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    """scale: as `store_scale` leaves it."""
    chunk = tl.program_id(0)
    row = table + row_of_chunk(table, rows, chunk, ROW_WORDS) * ROW_WORDS
    grad = tl.load(row + GRAD)
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    factor = tl.load(scale)
    limit = tl.load(scale + 1)
    if tl.load(row + LAYOUT) == BFLOAT16:
        _scale_chunk(grad, begin, count, factor, limit, True, ALIGNED)
    else:
        _scale_chunk(grad, begin, count, factor, limit, False, ALIGNED)
