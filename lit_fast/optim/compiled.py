"""What the optimizers of `lit_fast.optim` share: torch's class of that name, stepped by the compiled core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim.adopt import innermost
from lit_fast.optim.storage import asks_for_storage, keep_dtypes_on_load, storage_options


class Compiled(Optimizer):
    """A `torch.optim.Optimizer` whose `step` is one call of the core.

    A class names torch's class of the algorithm, where there is one, as its second base: what the core refuses (sparse
    gradients, another device) that one steps, unless the state is kept in a way that it does not know.
    """

    mapping: ops.Mapping

    def _set_storage(self, **given: Any) -> None:
        """Put the storage options into the defaults and into every param group; a group's own come first."""
        options = storage_options(**given)
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
            group.update(storage_options(**{name: group[name] for name in options}))
        keep_dtypes_on_load(self)
        self._stepper: ops.Stepper | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_dtypes_on_load(self)
        self._stepper = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, where given, computes the loss and the gradients first, and its value is returned.

        Raises:
            KernelError: the core refuses, and torch has no step for what is asked.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = next((p for group in self.param_groups for p in group["params"]), None)
        device = torch.device("cpu") if first is None else first.device
        if self._stepper is None or self._stepper.device != device:
            self._stepper = ops.Stepper(self.mapping, device)
        refusal = self._stepper.step(self.param_groups, self.state, 1.0, ops.NO_CLIPPING, ops.NO_CLIPPING)
        if isinstance(refusal, str):
            self._step_of_torch(refusal)
        return loss

    def _step_of_torch(self, refusal: str) -> None:
        name = type(self).__name__
        theirs: Any = next((base for base in type(self).__mro__ if base.__module__.startswith("torch.optim.")), None)
        if theirs is Optimizer or theirs is None:
            raise KernelError(f"lit_fast.optim.{name} cannot step: {refusal}.")
        if any(map(asks_for_storage, self.param_groups)):
            raise KernelError(
                f"lit_fast.optim.{name} cannot step: {refusal}. torch's own step knows neither state_dtype, master nor "
                f"rounding; leave them at their defaults for it."
            )
        innermost(theirs.step)(self)  # below torch's wrappers, which have run the hooks already
