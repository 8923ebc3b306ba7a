"""A loss scale within the step: gradients that `torch.amp.GradScaler` has scaled, unscaled in registers.

torch unscales in memory, a pass of its own over every gradient, and then waits for the device to hear whether all of
them are finite. Here the step that is taken anyway does both: the inverse of the scale is multiplied into each gradient
as the step reads it, and a step with a NaN or an infinity changes nothing (lit_fast/optim/nonfinite.py), which on a GPU
the device decides and the scaler is told there. The scaler's own `update` follows, with its own numbers.

Bits: a gradient times the inverse of the scale is rounded to float32 as torch rounds it. Clipped by norm it is
multiplied once more: torch rounds after each product, we multiply by the product of both. A power of two, as every
scale is that torch's defaults lead to, rounds nothing, and both are the same (but for unscaled gradients below 1.2e-38,
which have fewer bits); with another one they differ by two units in the last place at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from lit_fast.errors import MisconfigurationException
from lit_fast.ops import kernels_for
from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.nonfinite import Guard

# What GradScaler.step and update consist of. Whoever has another one wants it called.
_METHODS = ("step", "update", "unscale_", "_unscale_grads_", "_maybe_opt_step")


def is_torchs_own(scaler: torch.amp.GradScaler) -> bool:
    """Whether a scaler does what torch's does, and scales at all."""
    own = torch.amp.GradScaler
    replaced = (name in vars(scaler) or getattr(type(scaler), name) is not getattr(own, name) for name in _METHODS)
    return not any(replaced) and scaler.is_enabled()


class LossScale(Guard):
    """What one optimizer's steps take from a GradScaler and tell it, without waiting for a GPU.

    As a guard of the steps it counts those that are left out, as the scaler asks for. `told`: it is asked to unscale
    before each of them, and knows which they are.

    Args:
        scaler: torch's own, see `is_torchs_own`.
        adopted: has this object as its guard, or steps through what has.
        shared: whether other processes hold parts of the gradients, and here there may be none.
    """

    def __init__(self, scaler: torch.amp.GradScaler, adopted: AdoptedOptimizer, shared: bool = False) -> None:
        super().__init__("skip")
        self._shared = shared
        self.scaler, self.adopted = scaler, adopted
        self._kernels = kernels_for(adopted.device)[0]

    @property
    def in_registers(self) -> bool:
        """Whether the step itself may unscale, and find out whether to be left out. Otherwise the scaler does."""
        return self._kernels != "" and self.adopted.compiled and not self.told

    def step(self, step: Callable[..., Any], grad_scale: float | Tensor = 1.0) -> Any:
        """`step(grad_scale=...)` as `scaler.step(optimizer)` would take it, before or behind its `unscale_`.

        Args:
            grad_scale: multiplies the unscaled gradients.

        Raises:
            AssertionError, RuntimeError: torch's, where there is no gradient, or nothing was ever scaled, or the step
                has been taken since the last `scaler.update()`.
        """
        scaler, optimizer = self.scaler, self.adopted.optimizer
        scale, _ = scaler._check_scale_growth_tracker("step")
        known = scaler._per_optimizer_states[id(optimizer)]
        if known["stage"] is OptState.STEPPED or not (self._shared or _has_gradients(optimizer)):
            return scaler.step(optimizer)  # which raises
        if known["stage"] is OptState.READY and not self.in_registers:
            scaler.unscale_(optimizer)
        if known["stage"] is OptState.UNSCALED:
            result = self._step_unless(known["found_inf_per_device"], step, grad_scale)
        else:
            before = self._left_out()
            inverse = scale.double().reciprocal().float()  # as unscale_ computes it
            result = step(grad_scale=grad_scale * (inverse.item() if self._kernels == "CPU" else inverse))
            found = torch.as_tensor(self._left_out() != before, dtype=torch.float32)
            known["found_inf_per_device"] = {found.device: found}
        known["stage"] = OptState.STEPPED
        return result

    def _step_unless(self, found: dict[torch.device, Tensor], step: Callable[..., Any], grad_scale: Any) -> Any:
        if self.adopted.skips_on_device and self.adopted.guard is self:
            (infinite,) = found.values()  # a compiled step is on one device
            # An infinity that was clipped by value since is none any more: what the scaler has found decides.
            return step(grad_scale=torch.where(infinite == 0.0, grad_scale * torch.ones_like(infinite), torch.nan))
        if not any(infinite.item() for infinite in found.values()):
            return step(grad_scale=grad_scale)
        self.refuse(self.adopted.optimizer.param_groups)
        return None

    def _left_out(self) -> Any:
        """How many so far: a tensor where a device counts them."""
        return sum(self._counted.values(), start=self._refused)


class ScaledOptimizer(AdoptedOptimizer):
    """What `adopt` returns with a `scaler`: every `step` is one under it. `scaler.update()` is left to the loop."""

    def __init__(self, scaler: torch.amp.GradScaler, *adopted: Any) -> None:
        if not is_torchs_own(scaler):
            raise MisconfigurationException(
                f"adopt(scaler={scaler!r}): its step, update or unscale_ is not torch.amp.GradScaler's, or it is "
                f"disabled, so that no compiled step can do what it does. Leave scaler out, and call "
                f"scaler.step(optimizer)."
            )
        super().__init__(*adopted)
        if self.guard is not None:
            raise MisconfigurationException(
                f"adopt(nonfinite={self.guard.nonfinite!r}, scaler=...): the scaler has steps with NaN and infinite "
                f"gradients left out already, and finds its scale by them. Leave nonfinite out."
            )
        self.loss_scale = LossScale(scaler, self)
        if self.loss_scale.in_registers:
            self.set_guard(self.loss_scale)

    def step(self, grad_scale: float | Tensor = 1.0, clip: bool = True) -> Tensor | None:
        """One step under the scaler, unless a gradient is NaN or infinite; see `AdoptedOptimizer.step`.

        Gradients stay scaled in memory, unless `scaler.unscale_(optimizer)` was called before.

        Returns:
            With `max_norm`, the norm of the unscaled gradients; on the CPU None for a step that is left out behind
            `scaler.unscale_`.
        """
        take = super().step

        def step(grad_scale: float | Tensor) -> Tensor | None:
            return take(grad_scale, clip)

        result: Tensor | None = self.loss_scale.step(step, grad_scale)
        return result


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
