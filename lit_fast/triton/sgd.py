# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""SGD with weight decay, momentum, dampening and Nesterov momentum: csrc/formulas/sgd.h."""

import triton
import triton.language as tl

from lit_fast.triton.table import OWN, float64_at

OPTION_NAMES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "fused")
STATES = 1


@triton.jit
def coefficients(options, step, first, mask):
    """The float32 numbers that `update` takes, from float64 options; side by side for [n] addresses of options."""
    lr = float64_at(options + OWN, mask)
    momentum = float64_at(options + OWN + 1, mask)
    dampening = float64_at(options + OWN + 2, mask)
    weight_decay = float64_at(options + OWN + 3, mask)
    nesterov = float64_at(options + OWN + 4, mask) != 0.0
    maximize = float64_at(options + OWN + 5, mask) != 0.0
    return (
        (-lr).to(tl.float32),
        momentum.to(tl.float32),
        (1.0 - dampening).to(tl.float32),
        weight_decay.to(tl.float32),
        tl.where(maximize, -1.0, 1.0).to(tl.float32),
        tl.where(nesterov, 1.0, 0.0).to(tl.float32),
        first.to(tl.float32),
    )


COEFFICIENTS = 7


@triton.jit
def update(c, param, grad, buffer, unused):
    """One block's new parameter and momentum buffer; `c` as `coefficients` returns it, for one tensor."""
    negative_lr, momentum, one_minus_dampening, weight_decay, gradient_sign, nesterov, first = c
    grad = grad * gradient_sign
    grad = tl.where(weight_decay != 0.0, tl.fma(param, weight_decay, grad), grad)
    # A new buffer holds nothing yet; without momentum it is not one.
    buffer = tl.where(first != 0.0, grad, tl.fma(grad, one_minus_dampening, buffer * momentum))
    moved = tl.where(nesterov != 0.0, tl.fma(buffer, momentum, grad), buffer)
    grad = tl.where(momentum != 0.0, moved, grad)
    return tl.fma(grad, negative_lr, param), buffer, unused
