# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Muon's two passes around the orthogonalization: csrc/formulas/muon.h."""

import triton
import triton.language as tl

from lit_fast.triton.table import OWN, float64_at

OPTION_NAMES = ("lr", "adjusted_lr", "weight_decay", "momentum", "nesterov", "second_pass")
STATES = 1


@triton.jit
def coefficients(options, step, first, mask):
    """The float32 numbers that `update` takes, from float64 options; side by side for [n] addresses of options."""
    lr = float64_at(options + OWN, mask)
    adjusted_lr = float64_at(options + OWN + 1, mask)
    weight_decay = float64_at(options + OWN + 2, mask)
    momentum = float64_at(options + OWN + 3, mask)
    nesterov = float64_at(options + OWN + 4, mask) != 0.0
    second_pass = float64_at(options + OWN + 5, mask) != 0.0
    return (
        (1.0 - lr * weight_decay).to(tl.float32),
        (-adjusted_lr).to(tl.float32),
        momentum.to(tl.float32),
        (1.0 - momentum).to(tl.float32),
        tl.where(nesterov, 1.0, 0.0).to(tl.float32),
        tl.where(second_pass, 1.0, 0.0).to(tl.float32),
    )


COEFFICIENTS = 6


@triton.jit
def _lerp(start, end, weight):
    """As torch's, from the nearer end."""
    small = weight < 0.5
    return tl.fma(end - start, tl.where(small, weight, weight - 1.0), tl.where(small, start, end))


@triton.jit
def update(c, param, grad, buffer, unused):
    """One block of either pass; `c` as `coefficients` returns it, for one tensor."""
    parameter_decay, negative_lr, momentum, one_minus_momentum, nesterov, second_pass = c
    moved = _lerp(buffer, grad, one_minus_momentum)
    direction = tl.where(nesterov != 0.0, _lerp(grad, moved, momentum), moved)
    param = tl.where(second_pass != 0.0, tl.fma(grad, negative_lr, param * parameter_decay), direction)
    return param, moved, unused
