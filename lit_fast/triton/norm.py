# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The L2 norm of all gradients: one sum of squares a chunk, then one program that adds the chunks in their order.

In float64, as csrc/formulas/norm.h: a float32 square is exact there and cannot overflow, so that the norm is finite
exactly when every gradient is. Compensated float32 sums would be as accurate but not as wide. Relative error of the
sum: at most (chunk / block + log2(block) + chunks / block + log2(block)) 2^-53. Chunks belong to a tensor, so the bits
depend on the gradients and on their order alone.

A GPU with few float64 units (1 to 64 float32 ones) spends two operations of theirs on each element.
"""

import triton
import triton.language as tl

from lit_fast.triton.table import (
    BFLOAT16,
    BLOCK,
    CLIP_VALUE,
    FIRST_CHUNK,
    GRAD,
    GRAD_SCALE,
    LAYOUT,
    MAX_NORM,
    NUMEL,
    float64_at,
    load,
    named,
    row_of_chunk,
)

PARTIALS = tl.constexpr(1 << 11)  # chunks that the one program reads at a time


@triton.jit
def _chunk_sum(grad, begin, count, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = load(grad, begin + start, True, HALF, False, ALIGNED).to(tl.float64)
        sums = tl.fma(x, x, sums)
    if whole < count:
        x = load(grad, begin + whole, tl.arange(0, BLOCK) < count - whole, HALF, True, ALIGNED).to(tl.float64)
        sums = tl.fma(x, x, sums)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["rows"], repr=named("square_kernel"))
def square_kernel(table, rows, partial, CHUNK: tl.constexpr, ROW_WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    """partial: [chunks] float64, the sum of squares of each."""
    chunk = tl.program_id(0)
    row = table + row_of_chunk(table, rows, chunk, ROW_WORDS) * ROW_WORDS
    grad = tl.load(row + GRAD)
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    if tl.load(row + LAYOUT) == BFLOAT16:
        total = _chunk_sum(grad, begin, count, True, ALIGNED)
    else:
        total = _chunk_sum(grad, begin, count, False, ALIGNED)
    tl.store(partial + chunk, total)


@triton.jit
def total_norm(partial, chunks, clipping):
    """The norm of the gradients times |grad_scale|, float64; by one program."""
    sums = tl.zeros([PARTIALS], dtype=tl.float64)
    for start in range(0, chunks, PARTIALS):
        places = start + tl.arange(0, PARTIALS)
        sums += tl.load(partial + places, mask=places < chunks, other=0.0)
    return tl.sqrt(tl.sum(sums)) * tl.abs(float64_at(clipping + GRAD_SCALE))


@triton.jit
def store_scale(scale, norm, clipping):
    """scale: two float32. What gradients are multiplied by (grad_scale and, with a `max_norm`, the coefficient of
    `clip_grad_norm_`), and the limit of clipping by value, infinite where there is none."""
    factor = float64_at(clipping + GRAD_SCALE).to(tl.float32)
    max_norm = float64_at(clipping + MAX_NORM).to(tl.float32)
    coefficient = tl.div_rn(max_norm, norm + 1e-6)
    coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    tl.store(scale, tl.where(max_norm >= 0.0, factor * coefficient, factor))
    limit = float64_at(clipping + CLIP_VALUE)
    tl.store(scale + 1, tl.where(limit >= 0.0, limit, float("inf")).to(tl.float32))
