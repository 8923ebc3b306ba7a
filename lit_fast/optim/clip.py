"""Clipping by norm within a step, to the bits of `torch.nn.utils.clip_grad_norm_` followed by a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim.adopt import AdoptedOptimizer

# Torch sums squares in float32, in another order than the core. Its norm of a gradient cannot be further from the
# core's than this: below it the coefficient is 1 in both, and nothing needs torch's own.
SURELY_BELOW = 0.99


def step_clipped_by_norm(adopted: AdoptedOptimizer, max_norm: float) -> Callable[[], None]:
    """One step on gradients clipped to `max_norm`, which stay unclipped in memory.

    Most steps of a training are not clipped: the core's norm, one read, says so. Where it is, torch's own norm makes
    the coefficient, so that the weights are those of a loop written with `clip_grad_norm_`, to the last bit.
    """
    optimizer = adopted.optimizer

    def step() -> None:
        try:
            norm = ops.gradient_norm(optimizer.param_groups).item()
        except KernelError:  # a dtype or layout without a kernel
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
            adopted.step(clip=False)
            return
        if norm < SURELY_BELOW * max_norm:
            adopted.step(clip=False)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        coefficient = torch.clamp(max_norm / (get_total_norm(gradients) + 1e-6), max=1.0)
        adopted.step(grad_scale=coefficient.item(), clip=False)

    return step
