# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""AdamW, and Adam with L2 decay: csrc/formulas/adamw.h, without the remainder loop that torch has on the CPU only."""

import triton
import triton.language as tl

from lit_fast.triton.table import OWN, float64_at

OPTION_NAMES = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "amsgrad")
STATES = 2

COUNTER_BITS = tl.constexpr(25)  # a float32 counter counts to 2^24


@triton.jit
def _power(base, exponent):
    """base ** exponent by multiplications alone, the same on every device; float64, exponent a whole number."""
    digits = exponent.to(tl.int64)
    result = base * 0.0 + 1.0
    for _ in tl.static_range(COUNTER_BITS):
        result = tl.where((digits & 1) != 0, result * base, result)
        base = base * base
        digits = digits >> 1
    return result


@triton.jit
def coefficients(options, step, first, mask):
    """The float32 numbers that `update` takes, from float64 options; side by side for [n] addresses of options."""
    lr = float64_at(options + OWN, mask)
    beta1 = float64_at(options + OWN + 1, mask)
    beta2 = float64_at(options + OWN + 2, mask)
    eps = float64_at(options + OWN + 3, mask)
    weight_decay = float64_at(options + OWN + 4, mask)
    decoupled = float64_at(options + OWN + 5, mask) != 0.0
    maximize = float64_at(options + OWN + 6, mask) != 0.0
    parameter_decay = tl.where(decoupled, tl.fma(-lr, weight_decay, 1.0 + lr * 0.0), 1.0)
    l2_decay = tl.where(decoupled, 0.0, weight_decay)
    gradient_sign = tl.where(maximize, -1.0, 1.0)
    negative_step_size = -(lr / (1.0 - _power(beta1, step)))
    bias_correction2_sqrt = tl.sqrt(1.0 - _power(beta2, step))
    return (
        parameter_decay.to(tl.float32),
        l2_decay.to(tl.float32),
        gradient_sign.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        negative_step_size.to(tl.float32),
        bias_correction2_sqrt.to(tl.float32),
        eps.to(tl.float32),
    )


COEFFICIENTS = 9


@triton.jit
def update(c, param, grad, exp_avg, exp_avg_sq):
    """One block's new parameter and states; `c` as `coefficients` returns it, for one tensor."""
    (
        parameter_decay,
        l2_decay,
        gradient_sign,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        negative_step_size,
        bias_correction2_sqrt,
        eps,
    ) = c
    grad = grad * gradient_sign
    param = param * parameter_decay
    grad = tl.where(l2_decay != 0.0, tl.fma(param, l2_decay, grad), grad)
    # torch's lerp starts from the nearer end.
    near = one_minus_beta1 < 0.5
    weight = tl.where(near, one_minus_beta1, one_minus_beta1 - 1.0)
    exp_avg = tl.fma(weight, grad - exp_avg, tl.where(near, exp_avg, grad))
    exp_avg_sq = tl.fma(one_minus_beta2 * grad, grad, exp_avg_sq * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias_correction2_sqrt) + eps
    param = param + tl.div_rn(negative_step_size * exp_avg, denominator)
    return param, exp_avg, exp_avg_sq
