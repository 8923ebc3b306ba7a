# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What every kernel does with the table that the core wrote, and with the memory behind its addresses.

Rows and sets of options as csrc/stepper.h's `Table` has them, then the clipping: grad_scale, max_norm, clip_value in
float64, the latter two negative for none.
"""

import triton
import triton.language as tl

# One program takes one chunk (launch.py), block by block. A block is one or two 128-bit accesses a thread and tensor.
BLOCK = tl.constexpr(1 << 10)

# Words of a row.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
COUNTER = tl.constexpr(2)
NUMEL = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)
LAYOUT = tl.constexpr(5)
STATELESS = tl.constexpr(6)
OPTIONS = tl.constexpr(7)
STATE = tl.constexpr(8)

# Words of a set of options; the formula's own follow.
STEP = tl.constexpr(0)
FIRST = tl.constexpr(1)
OWN = tl.constexpr(2)

# Words of the clipping.
GRAD_SCALE = tl.constexpr(0)
MAX_NORM = tl.constexpr(1)
CLIP_VALUE = tl.constexpr(2)

# csrc/dtypes.h: which of parameter and gradient, state is in bfloat16.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)


def named(kernel: str):
    """For `triton.jit(repr=...)`: the name that a profiler shows, which says whose it is (profiler/kernels.py)."""
    return lambda specialization: f"lit_fast_{kernel}"


@triton.jit
def row_of_chunk(table, rows, chunk, ROW_WORDS: tl.constexpr):
    """The last row whose chunks begin at `chunk` or before: rows without elements have none."""
    low = rows * 0
    high = rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(table + middle * ROW_WORDS + FIRST_CHUNK) <= chunk:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def float64_at(words, mask=None):
    return tl.load(words, mask=mask).to(tl.float64, bitcast=True)


@triton.jit
def pointer(address, start, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    """To element `start` of a tensor; bfloat16 is moved as 16 bits."""
    if HALF:  # noqa: SIM108
        found = address.to(tl.pointer_type(tl.uint16)) + start
    else:
        found = address.to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def load(address, start, inside, HALF: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """[BLOCK] float32. `inside`: which elements exist, looked at where MASKED says so: a mask splits wide accesses."""
    places = pointer(address, start, HALF, ALIGNED) + tl.arange(0, BLOCK)
    if MASKED:  # noqa: SIM108
        found = tl.load(places, mask=inside, other=0)
    else:
        found = tl.load(places)
    if HALF:
        found = (found.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return found


@triton.jit
def store(address, start, inside, values, HALF: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """To bfloat16 by rounding to nearest even; every NaN becomes 0x7fc0."""
    places = pointer(address, start, HALF, ALIGNED) + tl.arange(0, BLOCK)
    if HALF:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(values != values, 0x7FC0, bits).to(tl.uint16)
    else:
        stored = values
    if MASKED:
        tl.store(places, stored, mask=inside)
    else:
        tl.store(places, stored)


@triton.jit
def scaled_gradient(grad, factor, limit):
    """clamp(grad * factor, -limit, limit); NaN stays NaN (csrc/formulas/scale.h)."""
    grad = grad * factor
    grad = tl.where(grad < -limit, -limit, grad)
    return tl.where(grad > limit, limit, grad)
