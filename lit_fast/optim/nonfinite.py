"""Gradients that are NaN or infinite: what a step does with them.

| `nonfinite`   | a step with such a gradient                                                                   |
|---------------|-----------------------------------------------------------------------------------------------|
| `"propagate"` | takes it, as torch does: the parameters become NaN. Nothing is read for it.                   |
| `"skip"`      | leaves parameters, states and step counters as they are, and counts itself in `skipped_steps` |
| `"raise"`     | leaves them too, and raises `NonFiniteGradientError`, which names the first such parameter    |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException, NonFiniteGradientError
from lit_fast.ops import ParamGroups

CHOICES = ("propagate", "skip", "raise")
NamedParameters = Callable[[], Iterable[tuple[str, Tensor]]]


def check_nonfinite(nonfinite: Any, device: torch.device) -> None:
    """Raises: MisconfigurationException: not one of the choices, or one that the device has not."""
    if nonfinite not in CHOICES:
        raise MisconfigurationException(f"nonfinite={nonfinite!r}: allowed are {', '.join(map(repr, CHOICES))}.")
    if nonfinite != "propagate" and device.type != "cpu":
        raise MisconfigurationException(
            f"nonfinite={nonfinite!r} on {device}: the host would have to wait for the device at every step, so it is "
            f"for the CPU so far. Use nonfinite='propagate', or precision='16-mixed', whose scaler skips such steps."
        )


class Guard:
    """What happens to the steps of one optimizer that has a gradient which is NaN or infinite.

    Attributes:
        nonfinite: "skip" or "raise".
        skipped_steps: how many steps were left out.

    Args:
        named_parameters: gives names to the parameters in the error; without it, or for one that it does not know, the
            names are those of the param group, or else its place there.
    """

    def __init__(self, nonfinite: str, named_parameters: NamedParameters | None = None) -> None:
        self.nonfinite = nonfinite
        self.named_parameters = named_parameters
        self.skipped_steps = 0

    def refuse(self, param_groups: ParamGroups) -> None:
        """A step is not taken.

        Raises:
            NonFiniteGradientError: with "raise".
        """
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return
        group, index = first_nonfinite(param_groups) or (0, 0)
        raise NonFiniteGradientError(
            f"The gradient of {self._name(param_groups, group, index)} is not finite. Nothing was changed. Look for "
            f"the cause with torch.autograd.detect_anomaly(), or lower the learning rate; nonfinite='skip' leaves such "
            f"steps out."
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
