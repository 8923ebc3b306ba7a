"""The optimizer that a Trainer has where an engine of somebody else's takes the steps: DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch.optim import Optimizer

from lit_fast.errors import MisconfigurationException


class EngineOptimizer(Optimizer):
    """Stands for `optimizer`, whose own `step` only the engine calls: `step` and `zero_grad` are the engine's.

    Param groups, state and defaults are the same objects, so that schedulers made for `optimizer` go on working.

    Args:
        optimizer: what `configure_optimizers` returned; the engine may have replaced its parameters by flat ones.
        step: the engine's step.
        zero_grad: the engine's.

    Raises:
        MisconfigurationException: when a param group is added, which the engine would never see.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[[], Any], zero_grad: Callable[[], Any]) -> None:
        # Not Optimizer.__init__, which checks and copies parameters.
        self.optimizer, self._step, self._zero_grad = optimizer, step, zero_grad
        shared = {name: getattr(optimizer, name) for name in ("defaults", "state", "param_groups")}
        self.__setstate__(shared)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The closure (forward and backward), where there is one, and the engine's step."""
        result = None if closure is None else closure()
        self._step(**kwargs)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        raise MisconfigurationException(
            f"{type(self.optimizer).__name__}.add_param_group: an engine that was made for the param groups of "
            f"configure_optimizers takes the steps, and knows no others. Return all of them there, those that are "
            f"trained later too, or use strategy='ddp'."
        )

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
