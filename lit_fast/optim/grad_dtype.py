"""Gradients in float32 of parameters in 16 bits: torch's `Tensor.grad_dtype`, and steps that do not know it.

bfloat16 has 8 bits: what is less than 1/256 of a sum is lost when it is added. Where `grad_dtype` is float32, autograd
casts each micro-batch's gradient and adds it in float32 (of a parameter that is used twice, each use's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException
from lit_fast.optim.adopt import AdoptedOptimizer

SHORT = (torch.bfloat16, torch.float16)


def keep_gradients_in(dtype: torch.dtype, parameters: Iterable[Tensor]) -> Callable[[], None]:
    """Have the gradients of all 16-bit `parameters` in `dtype` from now on.

    Returns:
        What gives them back the dtype that they had, and casts the gradients that there are.

    Raises:
        MisconfigurationException: this torch cannot.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> undo = keep_gradients_in(torch.float32, [weight])
        >>> weight.sum().backward()
        >>> weight.grad
        tensor([1., 1.])
        >>> undo()
        >>> weight.grad.dtype
        torch.bfloat16
    """
    if not hasattr(Tensor, "grad_dtype"):
        raise MisconfigurationException(
            f"Trainer(grad_dtype={dtype}): torch {torch.__version__} has no Tensor.grad_dtype, which a gradient of "
            f"another dtype than its parameter's needs; install a newer torch, or leave grad_dtype out."
        )
    before = [(p, p.grad_dtype) for p in parameters if p.dtype in SHORT]
    for p, _ in before:
        _set_grad_dtype(p, dtype)

    def undo() -> None:
        for p, dtype_before in before:
            _set_grad_dtype(p, dtype_before)

    return undo


def _set_grad_dtype(p: Tensor, dtype: torch.dtype | None) -> None:
    gradient, p.grad = p.grad, None  # torch sets it only where there is none
    p.grad_dtype = dtype
    p.grad = gradient if gradient is None or dtype is None else gradient.to(dtype)


class InParameterDtype:
    """Steps of an adopted optimizer with gradients cast to their parameters' dtype meanwhile.

    torch's own Adam, and whatever is fused, raises an error where the two differ, and so far no kernel takes them.
    """

    def __init__(self, adopted: AdoptedOptimizer) -> None:
        self.optimizer = adopted.optimizer
        self._step = adopted.step
        self._wide: list[tuple[Tensor, Tensor]] = []

    def step(self, grad_scale: float = 1.0, clip: bool = True) -> Tensor | None:
        """As `AdoptedOptimizer.step`. Afterwards `p.grad` is again what it was."""
        self.cast()
        try:
            return self._step(grad_scale, clip)
        finally:
            self.restore()

    def around(self, run_step: Callable[..., Any]) -> Callable[..., Any]:
        """`run_step(closure, **kwargs)`, each of whose evaluations ends with `cast`."""

        def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            def evaluate() -> Any:
                self.restore()
                return None if closure is None else closure()

            try:
                return run_step(evaluate, **kwargs)
            finally:
                self.restore()

        return step

    def cast(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.dtype is not p.dtype:
                    self._wide.append((p, p.grad))
                    _set_grad_dtype(p, p.dtype)

    def restore(self) -> None:
        for p, gradient in self._wide:
            p.grad = None
            p.grad_dtype = gradient.dtype
            p.grad = gradient
        self._wide.clear()
