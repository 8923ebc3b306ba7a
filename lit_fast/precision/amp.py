"""`MixedPrecision`: weights in float32, matrix products in 16 bits under autocast, and the loss scaled for float16."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lit_fast.errors import MisconfigurationException
from lit_fast.precision.precision import Precision

if TYPE_CHECKING:
    from lit_fast.module import LightningModule


class MixedPrecision(Precision):
    """Autocast to float16 ("16-mixed") or bfloat16 ("bf16-mixed").

    float16 ends at 65,504 and loses everything below 6e-8, so "16-mixed" scales the loss up before backward and the
    gradients down before the step, and skips a step whose gradients are not finite (`torch.amp.GradScaler`: the scale
    begins at 65,536, halves after such a step and doubles after 2,000 others). A skipped step still counts as a step
    for `global_step` and schedulers, as in Lightning.

    Where the compiled step is taken and nothing can look at the gradients around it, it unscales and clips them in
    registers, and they stay scaled in memory; on CUDA the device leaves the step out and moves the scale, and the host
    waits for neither. Otherwise the scaler unscales them in memory first, as in Lightning. lit_fast/optim/scaling.py
    says what is equal to the last bit.

    Args:
        precision: "16-mixed" or "bf16-mixed".
        device: the kind of device that autocast is for, "cpu" or "cuda".
        scaler: another `torch.amp.GradScaler` than the default one, for "16-mixed".

    Raises:
        MisconfigurationException: another precision, or a scaler for "bf16-mixed".

    Example:
        >>> plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        >>> sorted(plugin.state_dict())
        ['_growth_tracker', 'backoff_factor', 'growth_factor', 'growth_interval', 'scale']
    """

    def __init__(self, precision: str, device: str, scaler: torch.amp.GradScaler | None = None) -> None:
        dtypes = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        if precision not in dtypes:
            raise MisconfigurationException(
                f"MixedPrecision(precision={precision!r}): allowed are '16-mixed' and 'bf16-mixed'."
            )
        if scaler is not None and precision == "bf16-mixed":
            raise MisconfigurationException(
                f"MixedPrecision(precision='bf16-mixed', scaler={scaler!r}): bfloat16 has the range of float32 and "
                f"needs no scaled loss; leave the scaler out, or use '16-mixed'."
            )
        self.precision = precision
        self.device = device
        self.dtype = dtypes[precision]
        self.scaler = torch.amp.GradScaler(device) if scaler is None and precision == "16-mixed" else scaler

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.autocast_context_manager()

    def _bind_own(self, function: Callable[..., Any]) -> Callable[..., Any]:
        context = self.autocast_context_manager()  # it may be entered again and again, which saves making it each step

        def under_autocast(*args: Any) -> Any:
            with context:
                return function(*args)

        return under_autocast

    # -- as Lightning calls them; the plan does the same around the compiled step, see `bind_step`

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:
        return super().pre_backward(tensor if self.scaler is None else self.scaler.scale(tensor), module)

    def optimizer_step(
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        step = scaled_step(
            self.scaler, optimizer, model.automatic_optimization, lambda: self._after_closure(model, optimizer)
        )
        return step(closure, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)


def scaled_step(
    scaler: torch.amp.GradScaler,
    optimizer: Optimizer,
    automatic: bool,
    after_backward: Callable[[], None],
    compiled: Callable[[], Any] | None = None,
    in_registers: bool = False,
) -> Callable[..., Any]:
    """One step under a scaler: closure, unscale, hooks and clipping, then the update unless a gradient is not finite.

    Args:
        automatic: a closure that returns None then means that there was no backward, so nothing to unscale or step.
        after_backward: hooks and clipping, which see unscaled gradients.
        compiled: takes the step in place of `scaler.step`, where it may.
        in_registers: it also unscales, since nobody looks at the gradients before it.

    Raises:
        MisconfigurationException: the optimizer evaluates the loss itself (LBFGS): there is no one step to unscale.
    """
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            "precision='16-mixed' and LBFGS cannot be combined: LBFGS evaluates the loss several times within a step, "
            "and the gradients of each would have to be unscaled. Use precision='32-true' or 'bf16-mixed'."
        )
    unscale: Callable[[Optimizer], None] = _leave_scaled if in_registers else scaler.unscale_

    def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        skipped = automatic and result is None
        if not skipped:
            unscale(optimizer)
        after_backward()
        if skipped:
            return result
        if compiled is None or kwargs:
            result = scaler.step(optimizer, **kwargs)
        else:
            compiled()
        scaler.update()
        return result

    return step


def _leave_scaled(optimizer: Optimizer) -> None: ...
