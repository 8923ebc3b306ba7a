"""The optimizer that user code holds in manual optimization and in an overridden `optimizer_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lit_fast.errors import MisconfigurationTypeError

if TYPE_CHECKING:
    from lit_fast.module import LightningModule


class LightningOptimizer:
    """Wraps a `torch.optim` optimizer: `step` runs the Trainer's hooks and clipping and counts the step.

    Everything else (`param_groups`, `state`, `state_dict`, ...) is the wrapped optimizer's own, and the object is an
    instance of its class too, so that a scheduler or a library takes it for one.

    Args:
        optimizer: the user's optimizer. Before a plan is bound the wrapper does what the optimizer does.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._module: LightningModule | None = None
        self._run_step: Callable[..., Any] = lambda closure=None, **kwargs: optimizer.step(closure, **kwargs)
        self._release: Callable[[], None] = optimizer.zero_grad
        kind = type(optimizer)
        self.__class__ = type(f"Lightning{kind.__name__}", (type(self), kind), _forwarded(kind))

    def bind(self, run_step: Callable[..., Any], release: Callable[[], None], module: LightningModule) -> None:
        """Step in the Trainer's terms from now on.

        Args:
            run_step: `run_step(closure, **kwargs)` does one step.
            release: sets the gradients of the optimizer's parameters to None.
            module: whose optimizer it is; its `toggle_optimizer` is what `toggle_model` calls.
        """
        self._run_step, self._release, self._module = run_step, release, module

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One optimizer step; the closure, where given, runs first (and again, if the optimizer asks for it).

        Raises:
            MisconfigurationException: `closure` cannot be called.
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationTypeError(f"optimizer.step(closure={closure!r}): the closure must be callable.")
        return self._run_step(closure, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the gradients, or fill them with zeros where `set_to_none` is False."""
        if set_to_none:
            self._release()
        else:
            self._optimizer.zero_grad(set_to_none=False)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Inside, parameters that belong to the other optimizers alone require no gradient.

        Args:
            sync_grad: whether several processes exchange gradients inside; one process has none to exchange.
        """
        assert self._module is not None, "the optimizer belongs to no running Trainer"
        with self._module.toggled_optimizer(self):
            yield

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __repr__(self) -> str:
        return f"LightningOptimizer({self._optimizer!r})"


def _forwarded(kind: type) -> dict[str, Any]:
    """What a class has and the wrapper has not, as properties that lead to the wrapped object: an inherited method
    would change the wrapper's attributes in their place."""

    def forward(name: str) -> property:
        return property(
            lambda wrapper: getattr(wrapper._optimizer, name),
            lambda wrapper, value: setattr(wrapper._optimizer, name, value),
        )

    return {name: forward(name) for name in dir(kind) if not name.startswith("__") and name not in _OWN}


_OWN = frozenset(dir(LightningOptimizer))
