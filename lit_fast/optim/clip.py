"""Clipping by norm within a step, to the bits of `torch.nn.utils.clip_grad_norm_` followed by a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.profiler import record_function
from torch.nn.utils import clip_grad_norm_, get_total_norm

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.nonfinite import Guard, all_finite

# Torch sums squares in float32, in another order than the core. Its norm of a gradient cannot be further from the
# core's than this: below it the coefficient is 1 in both, and nothing needs torch's own.
SURELY_BELOW = 0.99

NORM_RANGE = "lit_fast_gradient_norm"  # marks a norm before a step for torch.profiler, which does not see the core
_UNMARKED = nullcontext()
_profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def _marked() -> AbstractContextManager[object]:
    return record_function(NORM_RANGE) if _profiler_enabled() else _UNMARKED


def step_clipped_by_norm(adopted: AdoptedOptimizer, max_norm: float, guard: Guard | None = None) -> Callable[..., None]:
    """`step(grad_scale=1.0)`: one on gradients times `grad_scale`, clipped to `max_norm`, that stay in memory as they
    are.

    Most steps of a training are not clipped: the core's norm, one read, says so. Where it is, torch's own norm makes
    the coefficient, so that the weights are those of a loop written with `clip_grad_norm_`, to the last bit.

    Args:
        guard: asked where a gradient is NaN or infinite, which the norm tells; `adopted` needs none then.
    """
    optimizer = adopted.optimizer

    def step(grad_scale: float = 1.0) -> None:
        try:
            with _marked():
                norm = ops.gradient_norm(optimizer.param_groups, grad_scale).item()
        except KernelError:  # a dtype or layout without a kernel
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if guard is not None and not all_finite(optimizer.param_groups):
                guard.refuse(optimizer.param_groups)
                return
            ops.refuse_sparse_gradients(parameters)
            if grad_scale != 1.0:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], grad_scale)
            clip_grad_norm_(parameters, max_norm)
            adopted.step(clip=False)
            return
        if norm < SURELY_BELOW * max_norm:
            adopted.step(grad_scale=grad_scale, clip=False)
            return
        # A norm that is not finite may be one that float32 cannot hold.
        if guard is not None and not math.isfinite(norm) and not all_finite(optimizer.param_groups):
            guard.refuse(optimizer.param_groups)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = get_total_norm(gradients)
        if grad_scale != 1.0 and not math.isfinite(total):  # squares of what a loss scale has multiplied
            total = torch.tensor(norm / grad_scale, dtype=torch.float32)
        # Both sides of the quotient divided by grad_scale, in double precision: the same bits where it is 1.
        coefficient = torch.clamp(max_norm / grad_scale / (total + 1e-6 / grad_scale), max=1.0)
        adopted.step(grad_scale=coefficient.item() * grad_scale, clip=False)

    return step


def step_by_shared_norm(
    adopted: AdoptedOptimizer, norm: Callable[..., torch.Tensor], max_norm: float | None, guard: Guard | None
) -> Callable[..., None]:
    """`step(grad_scale=1.0)` where each process holds parts of the gradients: all of them clip alike, or leave it out.

    Args:
        norm: `norm(grad_scale)` of all gradients, the same in every process; finite exactly when they are.
        max_norm: clip to it; None: the norm is only asked whether it is finite.
        guard: asked where it is not; `adopted` has none.
    """
    optimizer = adopted.optimizer

    def step(grad_scale: float | torch.Tensor = 1.0) -> None:
        with _marked():
            total = norm(grad_scale)
        if guard is not None and not math.isfinite(total.item()):  # waits for a GPU: all decide before anyone steps
            guard.refuse(optimizer.param_groups)
            return
        if max_norm is not None:
            coefficient = torch.clamp(torch.full_like(total, max_norm) / (total + 1e-6), max=1.0)  # the core's bits
            grad_scale = grad_scale * (coefficient.item() if total.is_cpu else coefficient)
        adopted.step(grad_scale=grad_scale)

    return step
