"""Precisions: the dtype of the weights, and the context in which a step computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException


@dataclass(frozen=True)
class Precision:
    """One precision. `weights` is the dtype that parameters are cast to (None: left alone); `autocast` the dtype of
    matrix products under autocast (None: no autocast)."""

    precision: str
    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context for a forward pass."""
        if self.autocast is not None:
            return torch.autocast(device.type, dtype=self.autocast)
        if self.weights is not None:
            return _default_dtype(self.weights)
        return nullcontext()

    def bind(self, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """`function` under this precision; the function itself where there is nothing to do."""
        if self.autocast is not None:
            context = torch.autocast(device.type, dtype=self.autocast)  # reusable: saves its construction each step

            def under_autocast(*args: Any) -> Any:
                with context:
                    return function(*args)

            return under_autocast

        dtype = self.weights
        if dtype is None:
            return function

        def in_dtype(*args: Any) -> Any:
            with _default_dtype(dtype):
                return function(*args)

        return in_dtype

    def convert_module(self, module: torch.nn.Module) -> None:
        if self.weights is not None:
            module.to(self.weights)

    def convert_input(self, batch: Any) -> Any:
        """Floating-point tensors of a batch in the dtype of the weights."""
        if self.weights is None:
            return batch
        return _cast_floats(batch, self.weights)


class _default_dtype(AbstractContextManager[None]):
    """Tensors made inside have this dtype by default."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self.before)


def _cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    from lit_fast.data.transfer import walk

    def cast(item: Any) -> Any:
        return item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item

    return walk(batch, cast)


_ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
_PRECISIONS = {
    "32-true": Precision("32-true"),
    "bf16-mixed": Precision("bf16-mixed", autocast=torch.bfloat16),
    "bf16-true": Precision("bf16-true", weights=torch.bfloat16),
}
_LATER = ("64-true", "16-mixed", "16-true", "transformer-engine", "transformer-engine-float16")


def resolve_precision(given: Any) -> Precision:
    """The precision by Lightning's name (`None` is "32-true").

    Raises:
        MisconfigurationException: an unknown name, or one that is not built yet.
    """
    name = "32-true" if given is None else str(given)
    name = _ALIASES.get(name, name)
    if name in _PRECISIONS:
        return _PRECISIONS[name]
    allowed = ", ".join(repr(known) for known in _PRECISIONS)
    if name in _LATER:
        raise MisconfigurationException(f"Trainer(precision={given!r}) is not built yet; allowed so far: {allowed}.")
    raise MisconfigurationException(f"Trainer(precision={given!r}) is unknown; allowed: {allowed}.")
