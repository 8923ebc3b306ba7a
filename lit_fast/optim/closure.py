"""Who evaluates the loss: the loop, before it steps an optimizer, or the optimizer, by calling a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.mapping import innermost


def calls_closure_itself(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step(closure)` has to be called with the closure, as Lightning calls every optimizer.

    torch's own optimizers but LBFGS, and ours, call a closure once, before anything else, so that forward and backward
    may as well run before the step. What somebody else's `step` does with it, and how often, cannot be known.
    """
    known = getattr(innermost(optimizer.step), "__module__", "").startswith(("torch.optim.", "lit_fast.optim."))
    return not known or isinstance(optimizer, torch.optim.LBFGS)


def plain_step(
    adopted: AdoptedOptimizer, update: Callable[[], Any], after_backward: Callable[[], None]
) -> Callable[..., Any]:
    """One step: the closure (forward and backward), then `after_backward` (hooks, clipping), then the update.

    Args:
        update: what steps, unless the optimizer has to be called with the closure.

    Returns:
        `step(closure=None, **kwargs)`, which returns what the closure returned.
    """
    optimizer = adopted.optimizer
    with_closure = calls_closure_itself(optimizer)

    def evaluate(closure: Callable[[], Any] | None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        after_backward()
        return result

    def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if kwargs or with_closure:
            return optimizer.step(closure=lambda: evaluate(closure), **kwargs)
        result = evaluate(closure)
        update()
        return result

    return step
