"""Gradients in float32 of parameters in 16 bits: torch's `Tensor.grad_dtype`, and its steps that know none.

bfloat16 has 8 bits: what is less than 1/256 of a sum is lost when it is added. Where `grad_dtype` is float32, autograd
casts each micro-batch's gradient and adds it in float32 (of a parameter that is used twice, each use's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_fast.errors import MisconfigurationException

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
    """Gradients cast to their parameters' dtype while torch's own step reads them, which may know no other.

    torch's Adam and whatever is fused raise an error where the two differ. The compiled steps read both dtypes.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._wide: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        self.cast()

    def __exit__(self, *_: object) -> None:
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
        """Every `p.grad` is again what it was."""
        for p, gradient in self._wide:
            p.grad = None
            p.grad_dtype = gradient.dtype
            p.grad = gradient
        self._wide.clear()
