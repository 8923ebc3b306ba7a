"""Optimizer steps in float64, each with a bound on what float32 arithmetic may make of it.

Independent of the kernels: written from the papers' formulas. `Bounded` carries a value and a bound on the absolute
error that a float32 evaluation of the same expression can have against it (running error analysis, Higham,
"Accuracy and stability of numerical algorithms", section 3.3). A fused multiply-add rounds once where this counts
two roundings, so the bound holds for it too.

Options are numbers, or tensors with one for each element of the others: many cases are then stepped at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Number = float | Tensor

# Largest relative error of one rounding to nearest; the stochastic one errs by less than twice that.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Below it a dtype loses relative accuracy; one rounding then errs by TINY * UNIT at most.
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}
SECOND_ORDER = 1.001  # products of rounding errors, which the first-order rules below leave out


@dataclass(frozen=True)
class Bounded:
    value: Tensor  # float64
    error: Tensor  # float64, absolute, of the float32 evaluation

    def _rounded(self, value: Tensor, error: Tensor, dtype: torch.dtype = torch.float32, times: float = 1.0) -> Bounded:
        unit = times * UNIT[dtype]
        return Bounded(value, SECOND_ORDER * error + unit * (value.abs() + error) + TINY[dtype] * unit)

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.error * other.value.abs() + other.error * self.value.abs() + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        least = (other.value.abs() - other.error).clamp_min(1e-300)
        value = self.value / other.value
        return self._rounded(value, (self.error + value.abs() * other.error) / least)

    def sqrt(self) -> Bounded:
        value = self.value.sqrt()
        lowest = (self.value - self.error).clamp_min(0.0).sqrt()
        return self._rounded(value, (self.error / (value + lowest).clamp_min(1e-300)))

    def stored(self, dtype: torch.dtype, stochastic: bool = False) -> Bounded:
        if dtype == torch.float32:
            return self
        return self._rounded(self.value, self.error, dtype, 2.0 if stochastic and dtype == torch.bfloat16 else 1.0)

    def coded(self, signed: bool, largest: Tensor) -> Bounded:
        """As 8-bit codes of a block whose largest magnitude is `largest` (csrc/formulas/storage.h).

        Codes lie 1/8 of a power of two apart, which is at most 1/8 of the value; below the smallest one, which is
        1.125 * 2^-15 (signed) or 2^-31 of the scale, a value becomes that or zero. The scale is a power of two and
        below twice largest / 1.875, so that scaling rounds nothing.
        """
        smallest = 1.125 * 2.0 ** (-15 if signed else -31) * 2.0 * largest / 1.875
        return Bounded(self.value, self.error + 1 / 8 * (self.value.abs() + self.error) + smallest)

    def larger(self, other: Bounded) -> Bounded:
        return Bounded(torch.maximum(self.value, other.value), torch.maximum(self.error, other.error))


def exact(tensor: Tensor) -> Bounded:
    return Bounded(tensor.detach().double(), torch.zeros_like(tensor, dtype=torch.float64))


def scalar(number: Number) -> Bounded:
    """A constant that the kernel computes in float64 and rounds to float32."""
    value = torch.as_tensor(number, dtype=torch.float64)
    return Bounded(value, SECOND_ORDER * UNIT[torch.float32] * value.abs())


def choose(condition: bool | Tensor, yes: Bounded, no: Bounded) -> Bounded:
    if isinstance(condition, bool):
        return yes if condition else no
    return Bounded(torch.where(condition, yes.value, no.value), torch.where(condition, yes.error, no.error))


def is_used(number: Number) -> bool:
    """Whether a number that switches a state on is not zero; for all elements alike."""
    used = torch.as_tensor(number) != 0.0
    assert bool(used.all()) or not used.any()
    return bool(used.any())


def directed(grad: Tensor, maximize: bool | Tensor) -> Bounded:
    return choose(maximize, -exact(grad), exact(grad))


def decayed(g: Bounded, p: Bounded, weight_decay: Number) -> Bounded:
    """The gradient with L2 decay; without one nothing is rounded."""
    return choose(weight_decay != 0.0, g + scalar(weight_decay) * p, g)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    *,
    lr: Number,
    betas: tuple[Number, Number],
    eps: Number,
    weight_decay: Number,
    decoupled: bool,
    grad_scale: float = 1.0,
    maximize: bool | Tensor = False,
    max_exp_avg_sq: Tensor | None = None,
) -> dict[str, Bounded]:
    """One step of Adam(W), amsgrad with a third moment; `step` counts from 1. Keys: param and the moments."""
    p, g, m, v = (exact(t) for t in (param, grad, exp_avg, exp_avg_sq))
    beta1, beta2 = betas
    if grad_scale != 1.0:
        g = g * scalar(grad_scale)
    g = choose(maximize, -g, g)
    if decoupled:
        p = p * scalar(1.0 - lr * weight_decay)
    else:
        g = decayed(g, p, weight_decay)
    m = m + scalar(1.0 - beta1) * (g - m)
    v = scalar(beta2) * v + scalar(1.0 - beta2) * g * g
    largest = v if max_exp_avg_sq is None else v.larger(exact(max_exp_avg_sq))
    denominator = largest.sqrt() / scalar((1.0 - beta2**step) ** 0.5) + scalar(eps)
    p = p - scalar(lr / (1.0 - beta1**step)) * m / denominator
    results = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    if max_exp_avg_sq is not None:
        results["max_exp_avg_sq"] = largest
    return {name: result.stored(param.dtype) for name, result in results.items()}


def norm_of_each(x: Bounded, tensor_of: Tensor) -> Bounded:
    """L2 norm of the tensor that each element belongs to. Norms of vectors differ by no more than their difference's;
    sums of squares in float64 add next to nothing."""

    def norm(values: Tensor) -> Tensor:
        return torch.zeros(len(tensor_of), dtype=torch.float64).index_add(0, tensor_of, values**2).sqrt()[tensor_of]

    return Bounded(norm(x.value), SECOND_ORDER * norm(x.error) + 1e-11 * norm(x.value))


def lamb_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    *,
    lr: Number,
    betas: tuple[Number, Number],
    eps: Number,
    weight_decay: Number,
    maximize: bool | Tensor = False,
    trust_clip: bool | Tensor = False,
    always_adapt: bool | Tensor = True,
    tensor_of: Tensor | None = None,
) -> dict[str, Bounded]:
    """One step of LAMB; `step` counts from 1. Keys: param and the moments.

    tensor_of: number of the parameter that each element belongs to; without it there is one.
    """
    p, m, v = (exact(t) for t in (param, exp_avg, exp_avg_sq))
    g = directed(grad, maximize)
    beta1, beta2 = betas
    m = m + scalar(1.0 - beta1) * (g - m)
    v = scalar(beta2) * v + scalar(1.0 - beta2) * g * g
    denominator = v.sqrt() / scalar((1.0 - beta2**step) ** 0.5) + scalar(eps)
    update = m * scalar(1.0 / (1.0 - beta1**step)) / denominator + scalar(weight_decay) * p
    each = torch.zeros(param.shape, dtype=torch.int64) if tensor_of is None else tensor_of
    of_param, of_update = norm_of_each(p, each), norm_of_each(update, each)
    ratio, one = of_param / of_update, exact(torch.ones(param.shape))
    ratio = choose((of_param.value > 0.0) & (of_update.value > 0.0), ratio, one)
    clipped = Bounded(ratio.value.clamp(max=1.0), ratio.error)
    ratio = choose(trust_clip, clipped, ratio)
    ratio = choose(torch.as_tensor(always_adapt) | (torch.as_tensor(weight_decay) != 0.0), ratio, one)
    results = {"param": p - scalar(lr) * ratio * update, "exp_avg": m, "exp_avg_sq": v}
    return {name: result.stored(param.dtype) for name, result in results.items()}


def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: Number,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool | Tensor = False,
    maximize: bool | Tensor = False,
) -> dict[str, Bounded]:
    """One step of SGD; no buffer means a parameter's first step. Keys: param and, with momentum, momentum_buffer."""
    p = exact(param)
    g = decayed(directed(grad, maximize), p, weight_decay)
    results: dict[str, Bounded] = {}
    if is_used(momentum):
        buffer = g
        if momentum_buffer is not None:
            buffer = scalar(momentum) * exact(momentum_buffer) + scalar(1.0 - dampening) * g
        results["momentum_buffer"] = buffer
        g = choose(nesterov, g + scalar(momentum) * buffer, buffer)
    results["param"] = p - scalar(lr) * g
    return {name: result.stored(param.dtype) for name, result in results.items()}


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: Number,
    betas: tuple[Number, Number],
    weight_decay: Number,
    grad_scale: float = 1.0,
    maximize: bool | Tensor = False,
) -> dict[str, Bounded]:
    """One step of Lion. Keys: param, exp_avg. A sign that rounding can turn is uncertain by 2."""
    p, g, m = (exact(t) for t in (param, grad, exp_avg))
    beta1, beta2 = betas
    if grad_scale != 1.0:
        g = g * scalar(grad_scale)
    g = choose(maximize, -g, g)
    blend = scalar(beta1) * m + scalar(1.0 - beta1) * g
    turnable = (blend.value.abs() <= blend.error) & ((m.value != 0.0) | (g.value != 0.0))
    direction = Bounded(blend.value.sign(), 2.0 * turnable.double())
    results = {
        "param": p * scalar(1.0 - lr * weight_decay) - scalar(lr) * direction,
        "exp_avg": scalar(beta2) * m + scalar(1.0 - beta2) * g,
    }
    return {name: result.stored(param.dtype) for name, result in results.items()}


def adagrad_step(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,
    step: int | Tensor,
    *,
    lr: Number,
    lr_decay: Number = 0.0,
    eps: Number,
    weight_decay: Number = 0.0,
    maximize: bool | Tensor = False,
) -> dict[str, Bounded]:
    """One step of Adagrad; `step` counts from 1. Keys: param, sum."""
    p = exact(param)
    g = decayed(directed(grad, maximize), p, weight_decay)
    total = exact(sum) + g * g
    results = {
        "param": p - scalar(lr / (1.0 + (step - 1.0) * lr_decay)) * g / (total.sqrt() + scalar(eps)),
        "sum": total,
    }
    return {name: result.stored(param.dtype) for name, result in results.items()}


def rmsprop_step(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    *,
    lr: Number,
    alpha: Number,
    eps: Number,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    maximize: bool | Tensor = False,
) -> dict[str, Bounded]:
    """One step of RMSprop: centered with a `grad_avg`, with momentum if there is a buffer. Keys: param, the moments."""
    p = exact(param)
    g = decayed(directed(grad, maximize), p, weight_decay)
    square = scalar(alpha) * exact(square_avg) + scalar(1.0 - alpha) * g * g
    results, variance = {"square_avg": square}, square
    if grad_avg is not None:
        mean = exact(grad_avg) + scalar(1.0 - alpha) * (g - exact(grad_avg))
        results["grad_avg"], variance = mean, square - mean * mean
    direction = g / (variance.sqrt() + scalar(eps))
    if momentum_buffer is not None:
        direction = scalar(momentum) * exact(momentum_buffer) + direction
        results["momentum_buffer"] = direction
    results["param"] = p - scalar(lr) * direction
    return {name: result.stored(param.dtype) for name, result in results.items()}


def orthogonalized(x: Bounded, coefficients: tuple[float, float, float], steps: int, eps: float) -> Bounded:
    """Muon's Newton-Schulz iteration of a matrix. Its bound is one number, of the error's Frobenius norm.

    An iteration is X -> U f(S) V^T with the odd f(s) = a s + b s^3 + c s^5, which stretches a difference by at most the
    largest |f'| up to the largest singular value (mean value theorem for f's divided differences); to that it adds
    what its three products round (Higham, section 3.5, in Frobenius norms).
    """
    a, b, c = coefficients
    unit = SECOND_ORDER * UNIT[torch.float32]
    tall = x.value.size(0) > x.value.size(1)
    m, rounding = (x.value.T if tall else x.value), x.error.norm().item()
    size = max(m.norm().item(), eps)
    rows, columns = m.shape
    m, error = m / size, (rounding * 2 + (m.numel() + 3) * unit * m.norm().item()) / size
    for _ in range(steps):
        largest = torch.linalg.matrix_norm(m, 2).item() + error
        s = torch.linspace(0.0, largest, 1000, dtype=torch.float64)
        stretch = (a + 3 * b * s**2 + 5 * c * s**4).abs().max().item()
        gram = m @ m.T
        of_gram = columns * unit * m.norm().item() ** 2
        inner = b * gram + c * gram @ gram
        sizes = abs(b) * gram.norm().item() + abs(c) * gram.norm().item() ** 2
        of_inner = (abs(b) + 2 * abs(c) * largest**2) * of_gram + (rows + 3) * unit * sizes
        made = largest * of_inner + (rows + 3) * unit * (abs(a) + inner.norm().item()) * m.norm().item()
        m, error = a * m + inner @ m, SECOND_ORDER * (stretch * error + made)
    m = m.T if tall else m
    return Bounded(m, torch.full_like(m, error))


def muon_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    stochastic: bool = False,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None = None,
) -> dict[str, Bounded]:
    """One step of Muon with products in float32. `dtype`: of the direction between the passes, rounded before and
    after them. Keys: param, momentum_buffer."""
    p, g = exact(param), exact(grad)
    buffer = exact(momentum_buffer) + scalar(1.0 - momentum) * (g - exact(momentum_buffer))
    direction = g + scalar(momentum) * (buffer - g) if nesterov else buffer
    direction = orthogonalized(direction.stored(dtype, stochastic), ns_coefficients, ns_steps, eps).stored(dtype)
    rows, columns = param.shape
    factor = 0.2 * max(rows, columns) ** 0.5 if adjust_lr_fn == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5
    p = p * scalar(1.0 - lr * weight_decay) - scalar(lr * factor) * direction
    return {"param": p, "momentum_buffer": buffer}


def assert_within(actual: Tensor, expected: Bounded) -> None:
    """`actual` lies within the derived bound, and the bound says something."""
    difference = (actual.detach().double() - expected.value).abs()
    worst = (difference - expected.error).max().item() if difference.numel() else -1.0
    assert worst <= 0.0, f"exceeds the derived bound by {worst}"
    assert bool((expected.error <= 0.05 * expected.value.abs().max().clamp_min(1e-30)).all())
