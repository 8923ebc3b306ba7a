# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""One optimizer step of all tensors in two launches, three with a norm.

`square_kernel` (norm.py) reads the gradients. `prepare_kernel`, one program, adds up the norm, makes the gradients'
factor of it, counts the steps of counters that lie on the device, and turns each tensor's options into the float32
coefficients of its formula; it is the only one here that computes in float64. `step_kernel` does the rest.
"""

import triton
import triton.language as tl

from lit_fast.triton.norm import store_scale, total_norm
from lit_fast.triton.table import (
    BFLOAT16,
    BLOCK,
    COUNTER,
    FIRST,
    FIRST_CHUNK,
    FLOAT32,
    GRAD,
    LAYOUT,
    NUMEL,
    OPTIONS,
    PARAM,
    STATE,
    STATELESS,
    STEP,
    float64_at,
    load,
    named,
    row_of_chunk,
    scaled_gradient,
    store,
)

LEFT_OUT = tl.constexpr(2)  # where `scale` has whether the step is
LARGEST = tl.constexpr(1.7976931348623157e308)  # finite float64
ROWS = tl.constexpr(128)  # tensors whose coefficients are computed side by side


@triton.jit(do_not_specialize=["rows", "chunks", "options_at", "clipping_at"], repr=named("prepare_kernel"))
def prepare_kernel(
    table,
    rows,
    chunks,
    options_at,
    clipping_at,
    partial,
    norm,
    scale,
    coefficients,
    skipped,
    ROW_WORDS: tl.constexpr,
    OPTION_WORDS: tl.constexpr,
    WITH_NORM: tl.constexpr,
    SKIPS: tl.constexpr,
    FOR_GOOD: tl.constexpr,
    FORMULA: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
):
    """By one program. partial: [chunks] float64; norm: one float32; scale: three; coefficients: [COEFFICIENTS, rows]
    float32; skipped: one int64.

    SKIPS, which needs the norm: a step with a NaN or infinite gradient is counted in `skipped` and not taken; FOR_GOOD:
    nor is any after it. FORMULA: a formula's `coefficients`, or None where gradients are all that the table has.
    """
    clipping = table + clipping_at
    total = 0.0
    if WITH_NORM:
        wide = total_norm(partial, chunks, clipping)
        total = wide.to(tl.float32)
        tl.store(norm, total)
        if SKIPS:
            before = tl.load(skipped)
            left_out = tl.where(wide <= LARGEST, 0, 1)  # NaN is not
            if FOR_GOOD:  # a warp that reads late, what another has stored, finds the same
                left_out = tl.where(before != 0, 1, left_out)
            tl.store(skipped, before + left_out)
            tl.store(scale + LEFT_OUT, left_out.to(tl.float32))
    store_scale(scale, total, clipping)
    if FORMULA is not None:
        for start in range(0, rows, ROWS):
            index = start + tl.arange(0, ROWS)
            inside = index < rows
            row = table + index * ROW_WORDS
            options = table + options_at + tl.load(row + OPTIONS, mask=inside, other=0) * OPTION_WORDS
            address = tl.load(row + COUNTER, mask=inside, other=0)
            counted = address != 0
            counter = address.to(tl.pointer_type(tl.float32))
            count = tl.load(counter, mask=counted, other=0.0) + 1.0
            moved = counted
            if SKIPS:
                moved = tl.where(left_out != 0, 0, address) != 0
            tl.store(counter, count, mask=moved)
            step = tl.where(counted, count.to(tl.float64), float64_at(options + STEP, inside))
            step = tl.where(inside, step, 1.0)
            values = FORMULA(options, step, float64_at(options + FIRST, inside), inside)
            for k in tl.static_range(COEFFICIENTS):
                tl.store(coefficients + k * rows + index, values[k], mask=inside)


@triton.jit
def _coefficients_of(coefficients, rows, index, COEFFICIENTS: tl.constexpr):
    found = ()
    for k in tl.static_range(COEFFICIENTS):
        found = found + (tl.load(coefficients + k * rows + index),)  # noqa: RUF005  (all that Triton compiles)
    return found


@triton.jit
def _step_block(
    param,
    grad,
    state0,
    state1,
    stateless,
    start,
    inside,
    factor,
    limit,
    c,
    HALF: tl.constexpr,
    HALF_STATE: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
):
    p = load(param, start, inside, HALF, MASKED, ALIGNED)
    g = load(grad, start, inside, HALF, MASKED, ALIGNED)
    s0 = load(state0, start, inside, HALF_STATE, MASKED, ALIGNED)
    s1 = s0
    if STATES == 2:
        s1 = load(state1, start, inside, HALF_STATE, MASKED, ALIGNED)
    p, s0, s1 = UPDATE(c, p, scaled_gradient(g, factor, limit), s0, s1)
    store(param, start, inside, p, HALF, MASKED, ALIGNED)
    if stateless == 0:
        store(state0, start, inside, s0, HALF_STATE, MASKED, ALIGNED)
        if STATES == 2:
            store(state1, start, inside, s1, HALF_STATE, MASKED, ALIGNED)


@triton.jit
def _step_chunk(
    row,
    begin,
    count,
    factor,
    limit,
    c,
    HALF: tl.constexpr,
    HALF_STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
):
    param = tl.load(row + PARAM)
    grad = tl.load(row + GRAD)
    stateless = tl.load(row + STATELESS)
    # Something to read where there is no state, which nothing looks at.
    state0 = tl.where(stateless != 0, param, tl.load(row + STATE))
    state1 = state0
    if STATES == 2:
        state1 = tl.where(stateless != 0, param, tl.load(row + STATE + 1))
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _step_block(
            param,
            grad,
            state0,
            state1,
            stateless,
            begin + start,
            True,
            factor,
            limit,
            c,
            HALF,
            HALF_STATE,
            False,
            ALIGNED,
            UPDATE,
            STATES,
        )
    if whole < count:
        _step_block(
            param,
            grad,
            state0,
            state1,
            stateless,
            begin + whole,
            tl.arange(0, BLOCK) < count - whole,
            factor,
            limit,
            c,
            HALF,
            HALF_STATE,
            True,
            ALIGNED,
            UPDATE,
            STATES,
        )


@triton.jit(do_not_specialize=["rows"], repr=named("step_kernel"))
def step_kernel(
    table,
    rows,
    scale,
    coefficients,
    CHUNK: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """One program a chunk. UPDATE: a formula's `update`; scale, coefficients: as `prepare_kernel` left them."""
    chunk = tl.program_id(0)
    index = row_of_chunk(table, rows, chunk, ROW_WORDS)
    row = table + index * ROW_WORDS
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    if SKIPS:
        count = tl.where(tl.load(scale + LEFT_OUT) != 0.0, 0, count)
    factor = tl.load(scale)
    limit = tl.load(scale + 1)
    c = _coefficients_of(coefficients, rows, index, COEFFICIENTS)
    layout = tl.load(row + LAYOUT)
    if layout == FLOAT32:
        _step_chunk(row, begin, count, factor, limit, c, False, False, ALIGNED, UPDATE, STATES)
    elif layout == BFLOAT16:
        _step_chunk(row, begin, count, factor, limit, c, True, True, ALIGNED, UPDATE, STATES)
    else:
        _step_chunk(row, begin, count, factor, limit, c, False, True, ALIGNED, UPDATE, STATES)
