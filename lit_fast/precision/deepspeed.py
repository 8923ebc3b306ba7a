"""`DeepSpeedPrecision`: weights and inputs in the dtype that DeepSpeed's engine computes in, and no autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lit_fast.errors import MisconfigurationException
from lit_fast.precision.half import cast_floating
from lit_fast.precision.precision import Precision, default_dtype

_DTYPES = {
    "32-true": torch.float32,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}


class DeepSpeedPrecision(Precision):
    """What `Trainer(precision=...)` means under `strategy="deepspeed"`.

    In 16 bits DeepSpeed makes all parameters that dtype, keeps their masters in float32 for the optimizer, and scales
    the loss where it is float16; "mixed" and "true" differ only in the dtype of what is made before the fit begins.
    Batches come in that dtype.

    Args:
        precision: "32-true", "16-mixed", "16-true", "bf16-mixed" or "bf16-true".

    Raises:
        MisconfigurationException: another one.

    Example:
        >>> DeepSpeedPrecision("bf16-mixed").convert_input(torch.ones(2)).dtype
        torch.bfloat16
    """

    def __init__(self, precision: str) -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"DeepSpeedPrecision(precision={precision!r}): allowed are {', '.join(map(repr, _DTYPES))}."
            )
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self.loss_scaler: Any = None  # DeepSpeed's, once there is one

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.dtype) if self.precision.endswith("true") else module

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, self.dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype) if self.precision.endswith("true") else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def state_dict(self) -> dict[str, Any]:
        """Where the loss scale of float16 stands."""
        if self.loss_scaler is None or not self.loss_scaler.dynamic:
            return {}
        return {name: value for name, value in vars(self.loss_scaler).items() if isinstance(value, int | float)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.loss_scaler is not None:
            vars(self.loss_scaler).update(state_dict)
