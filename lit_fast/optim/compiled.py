"""What the optimizers of `lit_fast.optim` share: torch's class of that name, stepped by the compiled core."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_fast import ops
from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim.mapping import has_step_hooks, innermost
from lit_fast.optim.storage import asks_for_storage, check_groups, keep_dtypes_on_load, set_options

# Options that are one number, 0 or more. What else torch's classes ask of theirs, they check themselves.
_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "alpha", "lr_decay")


def check_options(options: dict[str, Any], where: str = "") -> None:
    """Raises a MisconfigurationException that names an option of a formula which is none of the numbers allowed.

    Args:
        where: what the message begins with.
    """
    for name in _NUMBERS:
        if name in options and not _is_number(options[name]):
            raise MisconfigurationException(
                f"{where}{name}={options[name]!r}: it must be a number, 0 or more, and finite."
            )
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, Iterable) or [_is_number(beta, 1.0) for beta in betas] != [True, True]:
            raise MisconfigurationException(f"{where}betas={betas!r}: two numbers from 0 to 1, 1 not included.")


def _is_number(value: Any, end: float = math.inf) -> bool:
    """Whether it is a number from 0 to `end`, not included, that a tensor may hold, too."""
    number: Any = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    try:
        return isinstance(number, numbers.Real) and 0.0 <= float(number) < end
    except OverflowError:  # an integer beyond float64
        return False


class Compiled(Optimizer):
    """A `torch.optim.Optimizer` whose `step` is one call of the core.

    A class names torch's class of the algorithm, where there is one, as its second base: what the core refuses (sparse
    gradients, float64) that one steps, and a warning says so, unless the state is kept in a way that it does not know.
    """

    mapping: ops.Mapping
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def _set_storage(self, **given: Any) -> None:
        """Put the storage options into the defaults and into every param group; a group's own come first."""
        set_options(self, self.mapping.state_keys, given, override=False)
        keep_dtypes_on_load(self)
        self._stepper: ops.Stepper | None = None
        self._left_out: Tensor | None = None
        self._refusal = ""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; options of its own are checked, and a group that is refused is not added."""
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        try:
            check_options(self.param_groups[number], f"param group {number}: ")
            if "state_dtype" in self.defaults:  # not while torch's constructor runs
                check_groups(self.param_groups, self.mapping.state_keys)
        except MisconfigurationException:
            del self.param_groups[number]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_dtypes_on_load(self)
        self._stepper = None
        self._left_out = None
        self._refusal = ""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, where given, computes the loss and the gradients first, and its value is returned.

        Raises:
            KernelError: the core refuses, and torch has no step for what is asked.
            MisconfigurationException: a param group's storage options were changed to what is not allowed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepper = self._stepper_here()
        found = getattr(self, "found_inf", None)
        if isinstance(found, Tensor):  # a scaler that has seen no gradient puts a 0 there
            self._step_under_scaler(stepper, found)
            return loss
        refusal = stepper.step(self.param_groups, self.state, 1.0, ops.NO_CLIPPING, ops.NO_CLIPPING)
        if isinstance(refusal, str):
            self._step_of_torch(refusal)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `torch.amp.GradScaler.step`: may it leave unscaling, and leaving steps out, to `step`?

        On a GPU, where it would wait to hear whether a gradient is infinite; not where a hook would see scaled ones, or
        run for a step that is left out.
        """
        return self._stepper_here().skips_on_device and not has_step_hooks(self)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, of_torch: bool) -> None:
        """What torch's constructors say of their fused step, which is another."""

    def _step_under_scaler(self, stepper: ops.Stepper, found: Tensor) -> None:
        """With what `GradScaler.step` has put here: `found_inf`, and `grad_scale` unless `unscale_` has been called."""
        scale = getattr(self, "grad_scale", None)
        inverse: Tensor = torch.ones_like(found) if scale is None else scale.double().reciprocal().float()
        if self._left_out is None or self._left_out.device != stepper.device:
            self._left_out = torch.zeros((), dtype=torch.int64, device=stepper.device)
        step = stepper.skipping(self._left_out, told=True)
        factor = torch.where(found == 0.0, inverse, torch.nan)
        refusal = step(self.param_groups, self.state, factor, ops.NO_CLIPPING, ops.NO_CLIPPING)
        if isinstance(refusal, str) and not found.item():
            ops.scale_gradients_(self.param_groups, inverse)
            self.grad_scale = self.found_inf = None
            self._step_of_torch(refusal)

    def _stepper_here(self) -> ops.Stepper:
        first = next((p for group in self.param_groups for p in group["params"]), None)
        device = torch.device("cpu") if first is None else first.device
        if self._stepper is None or self._stepper.device != device:
            self._stepper = self.mapping.stepper(device)
        return self._stepper

    def _step_of_torch(self, refusal: str) -> None:
        check_groups(self.param_groups, self.mapping.state_keys)
        name = type(self).__name__
        theirs: Any = next((base for base in type(self).__mro__ if base.__module__.startswith("torch.optim.")), None)
        if theirs is Optimizer or theirs is None:
            raise KernelError(f"lit_fast.optim.{name} cannot step: {refusal}.")
        if any(map(asks_for_storage, self.param_groups)):
            raise KernelError(
                f"lit_fast.optim.{name} cannot step: {refusal}. torch's own step knows neither state_dtype, master nor "
                f"rounding; leave them at their defaults for it."
            )
        if refusal != self._refusal:
            self._refusal = refusal
            warnings.warn(f"lit_fast.optim.{name}: torch's own step runs, because {refusal}.", stacklevel=4)
        innermost(theirs.step)(self)  # below torch's wrappers, which have run the hooks already
