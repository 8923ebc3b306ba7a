"""`HalfPrecision`: weights, inputs and arithmetic in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lit_fast.errors import MisconfigurationException
from lit_fast.precision.precision import Precision, default_dtype


def cast_floating(data: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating-point tensors cast, wherever in it they lie."""
    from lit_fast.data.transfer import walk

    def cast(item: Any) -> Any:
        return item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item

    return walk(data, cast)


class TruePrecision(Precision):
    """Weights, floating-point inputs and new tensors all of one dtype."""

    dtype: torch.dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.dtype)

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, self.dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype)

    def _bind_own(self, function: Callable[..., Any]) -> Callable[..., Any]:
        dtype = self.dtype

        def in_dtype(*args: Any) -> Any:
            with default_dtype(dtype):
                return function(*args)

        return in_dtype


class HalfPrecision(TruePrecision):
    """Everything in 16 bits: "16-true" is float16, "bf16-true" is bfloat16.

    Raises:
        MisconfigurationException: another precision.

    Example:
        >>> HalfPrecision("bf16-true").convert_module(torch.nn.Linear(2, 1)).weight.dtype
        torch.bfloat16
    """

    def __init__(self, precision: str = "16-true") -> None:
        dtypes = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
        if precision not in dtypes:
            raise MisconfigurationException(
                f"HalfPrecision(precision={precision!r}): allowed are '16-true' and 'bf16-true'."
            )
        self.precision = precision
        self.dtype = dtypes[precision]
