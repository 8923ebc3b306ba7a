"""Gradients that are NaN or infinite: what a step does with them.

| `nonfinite`   | a step with such a gradient                                                                   |
|---------------|-----------------------------------------------------------------------------------------------|
| `"propagate"` | takes it, as torch does: the parameters become NaN. Nothing is read for it.                   |
| `"skip"`      | leaves parameters, states and step counters as they are, and counts itself in `skipped_steps` |
| `"raise"`     | leaves them too, and raises `NonFiniteGradientError`, which names the first such parameter    |

On a GPU the device itself leaves such steps out and counts them, and nobody waits for it: the error of "raise" comes
with a later step, and until then no step changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException, NonFiniteGradientError
from lit_fast.ops import ParamGroups, State, Step, Stepper, kernels_for

CHOICES = ("propagate", "skip", "raise")
NamedParameters = Callable[[], Iterable[tuple[str, Tensor]]]


def check_nonfinite(nonfinite: Any, device: torch.device) -> None:
    """Raises: MisconfigurationException: not one of the choices, or one that the device has not."""
    if nonfinite not in CHOICES:
        raise MisconfigurationException(f"nonfinite={nonfinite!r}: allowed are {', '.join(map(repr, CHOICES))}.")
    if nonfinite == "propagate":
        return
    kernels, why = kernels_for(device)
    if not kernels:
        raise MisconfigurationException(
            f"nonfinite={nonfinite!r} on {device}: no kernel can leave a step out there, because {why}. Use "
            f"nonfinite='propagate', or precision='16-mixed', whose scaler skips such steps."
        )


class Guard:
    """What happens to the steps that have a gradient which is NaN or infinite.

    Attributes:
        nonfinite: "skip" or "raise".
        told: whether on a GPU `grad_scale` says which steps those are, by NaN, and no gradient is read to know.

    Args:
        named_parameters: gives names to the parameters in the error; without it, or for one that it does not know, the
            names are those of the param group, or else its place there.
    """

    told = False

    def __init__(self, nonfinite: str, named_parameters: NamedParameters | None = None) -> None:
        self.nonfinite = nonfinite
        self.named_parameters = named_parameters
        self._refused = 0
        self._counted: dict[torch.device, Tensor] = {}
        self._arrivals: dict[torch.device, tuple[Tensor, torch.cuda.Event]] = {}

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out. Waits for a device that counts them."""
        return self._refused + sum(int(count.item()) for count in self._counted.values())

    def refuse(self, param_groups: ParamGroups) -> None:
        """A step is not taken.

        Raises:
            NonFiniteGradientError: with "raise".
        """
        if self.nonfinite == "skip":
            self._refused += 1
            return
        self._raise(param_groups)

    # ---- steps that a device leaves out ----

    def counted_on(self, device: torch.device) -> Tensor:
        """The number of steps that the device has left out: 0-dim int64, there."""
        if device not in self._counted:
            self._counted[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._counted[device]

    def ask(self, device: torch.device) -> None:
        """Have the count sent to the host, some time."""
        count, (arrived, event) = self.counted_on(device), self._arrival(device)
        arrived.copy_(count, non_blocking=True)
        event.record(torch.cuda.current_stream(device))

    def raise_if_told(self, param_groups: ParamGroups, device: torch.device) -> None:
        """Raises: NonFiniteGradientError: a count that has arrived by now says that steps were left out."""
        arrived, event = self._arrival(device)
        if event.query() and arrived.item():  # type: ignore[no-untyped-call]
            self._raise(param_groups, int(arrived.item()))

    def check(self, param_groups: ParamGroups) -> None:
        """Wait for the devices.

        Raises:
            NonFiniteGradientError: with "raise", a step was left out.
        """
        if self.nonfinite == "raise" and self._counted and (skipped := self.skipped_steps):
            self._raise(param_groups, skipped)

    def _arrival(self, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        if device not in self._arrivals:
            pinned = torch.zeros((), dtype=torch.int64, pin_memory=True)
            self._arrivals[device] = pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]
        return self._arrivals[device]

    def _raise(self, param_groups: ParamGroups, skipped: int = 0) -> None:
        found = first_nonfinite(param_groups)
        whose = f"The gradient of {self._name(param_groups, *found)} is" if found else "A gradient was"
        since = f" in the last {skipped} steps, which the device has left out" if skipped else ""
        raise NonFiniteGradientError(
            f"{whose} not finite. Nothing was changed{since}. Look for the cause with "
            f"torch.autograd.detect_anomaly(), or lower the learning rate; nonfinite='skip' leaves such steps out."
        )

    def _name(self, param_groups: ParamGroups, group: int, index: int) -> str:
        parameter = param_groups[group]["params"][index]
        known = self.named_parameters() if self.named_parameters is not None else ()
        for name, other in known:
            if other is parameter:
                return name
        if names := param_groups[group].get("param_names"):
            return str(names[index])
        return f"parameter {index} of param group {group}, of shape {tuple(parameter.shape)}"


def guarded(stepper: Stepper, guard: Guard) -> Step:
    """The core's step, which is not taken where a gradient is NaN or infinite."""
    return _left_out_by_device(stepper, guard) if stepper.skips_on_device else _left_out_by_host(stepper, guard)


def _left_out_by_host(stepper: Stepper, guard: Guard) -> Step:
    def step(
        param_groups: ParamGroups, state: State, grad_scale: Any, max_norm: float, clip_value: float
    ) -> Tensor | str | None:
        norm = stepper.step_if_finite(param_groups, state, grad_scale, max_norm, clip_value)
        if isinstance(norm, str):
            return norm
        if not math.isfinite(norm):
            guard.refuse(param_groups)
        return None if max_norm < 0.0 else torch.tensor(norm, dtype=torch.float32)

    return step


def _left_out_by_device(stepper: Stepper, guard: Guard) -> Step:
    """An error comes as soon as the host knows without waiting."""
    device = stepper.device
    step = stepper.skipping(guard.counted_on(device), guard.nonfinite == "raise", guard.told)
    if guard.nonfinite == "skip":
        return step

    def step_or_raise(param_groups: ParamGroups, *arguments: Any) -> Tensor | float | str | None:
        if torch.cuda.is_current_stream_capturing():  # replays ask nobody: `Guard.check` does
            return step(param_groups, *arguments)
        guard.raise_if_told(param_groups, device)
        result = step(param_groups, *arguments)
        guard.ask(device)
        return result

    return step_or_raise


def unless_nonfinite(clip: Callable[..., None]) -> Callable[..., None]:
    """`clip`, which leaves gradients alone where one is NaN or infinite: by value it would hide that from the step."""

    def clip_finite(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        if all_finite(optimizer.param_groups):
            clip(optimizer, *arguments)

    return clip_finite


def all_finite(param_groups: ParamGroups) -> bool:
    """Whether no gradient holds a NaN or an infinity, by torch: for optimizers and tensors that have no kernel."""
    gradients = [values_of(p.grad) for group in param_groups for p in group["params"] if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return True
    return all(largest.isfinite().item() for largest in torch._foreach_norm(gradients, float("inf")))


def first_nonfinite(param_groups: ParamGroups) -> tuple[int, int] | None:
    """Param group and place in it of the first parameter with such a gradient."""
    for group, options in enumerate(param_groups):
        for index, parameter in enumerate(options["params"]):
            if parameter.grad is not None and not values_of(parameter.grad).isfinite().all().item():
                return group, index
    return None


def values_of(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
