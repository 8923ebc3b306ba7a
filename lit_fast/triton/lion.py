# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Lion: a step of constant size in the direction of a sign.

    p <- p (1 - lr * weight_decay)
    p <- p - lr * sign(beta1 * m + (1 - beta1) * g)
    m <- beta2 * m + (1 - beta2) * g

p: parameter, g: gradient (negated to maximize), m: `exp_avg`. Products of (1 - beta) are kept exact in an fma, as in
the second moment of AdamW. Chen et al. 2023, "Symbolic discovery of optimization algorithms", arXiv:2302.06675.
"""

import triton
import triton.language as tl

from lit_fast.triton.table import OWN, float64_at

OPTION_NAMES = ("lr", "beta1", "beta2", "weight_decay", "maximize")
STATES = 1


@triton.jit
def coefficients(options, step, first, mask):
    """The float32 numbers that `update` takes, from float64 options; side by side for [n] addresses of options."""
    lr = float64_at(options + OWN, mask)
    beta1 = float64_at(options + OWN + 1, mask)
    beta2 = float64_at(options + OWN + 2, mask)
    weight_decay = float64_at(options + OWN + 3, mask)
    maximize = float64_at(options + OWN + 4, mask) != 0.0
    return (
        tl.fma(-lr, weight_decay, 1.0 + lr * 0.0).to(tl.float32),
        (-lr).to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        tl.where(maximize, -1.0, 1.0).to(tl.float32),
    )


COEFFICIENTS = 7


@triton.jit
def update(c, param, grad, exp_avg, unused):
    """One block's new parameter and moment; `c` as `coefficients` returns it, for one tensor."""
    parameter_decay, negative_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, gradient_sign = c
    grad = grad * gradient_sign
    blend = tl.fma(grad, one_minus_beta1, exp_avg * beta1)
    direction = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, blend))  # 0 and NaN stay
    param = tl.fma(direction, negative_lr, param * parameter_decay)
    return param, tl.fma(grad, one_minus_beta2, exp_avg * beta2), unused
