"""The optimizer that user code holds in manual optimization and in an overridden `optimizer_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from typing_extensions import Self


class _OfWrapped:
    """A name that a wrapper has from the class that it imitates: read from the wrapped optimizer."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        return getattr(self.kind if wrapper is None else wrapper._optimizer, self.name)


def _imitating(kind: type) -> type:
    """`LightningAdamW`, say: by isinstance and issubclass an AdamW, whose every method is the wrapped optimizer's.

    Schedulers take nothing but an Optimizer, and programs ask which one it is. The methods run on the wrapped optimizer
    itself, since what they assign (`load_state_dict`: the whole state) has to arrive there.
    """
    names = {name for name in dir(kind) if not (name.startswith("__") and name.endswith("__"))}
    forwarded = {name: _OfWrapped(kind, name) for name in names - set(dir(LightningOptimizer))}
    return type(f"Lightning{kind.__name__}", (LightningOptimizer, kind), forwarded)


class LightningOptimizer:
    """Wraps a `torch.optim` optimizer: `step` runs the Trainer's hooks and clipping and counts the step.

    Everything else (`param_groups`, `state`, `state_dict`, ...) is the wrapped optimizer's own.

    Args:
        optimizer: the user's optimizer. Without a Trainer, or before its plan is bound, the wrapper does what the
            optimizer does.
    """

    def __new__(cls, optimizer: Optimizer) -> Self:
        made: Self = object.__new__(_imitating(type(optimizer)))
        return made

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.bind(lambda closure=None, **kwargs: optimizer.step(closure, **kwargs), optimizer.zero_grad, [optimizer])

    def bind(self, run_step: Callable[..., Any], release: Callable[[], None], siblings: Sequence[Optimizer]) -> None:
        """Step in the Trainer's terms from now on.

        Args:
            run_step: `run_step(closure, **kwargs)` does one step.
            release: sets the gradients of the optimizer's parameters to None.
            siblings: every optimizer of the run, this one included.
        """
        self._run_step, self._release, self._siblings = run_step, release, siblings

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One optimizer step; the closure, where given, runs first (and again, if the optimizer asks for it).

        Raises:
            TypeError: `closure` cannot be called.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"optimizer.step(closure={closure!r}): the closure must be callable.")
        return self._run_step(closure, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the gradients, or fill them with zeros where `set_to_none` is False."""
        if set_to_none:
            self._release()
        else:
            self._optimizer.zero_grad(set_to_none=False)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Inside, parameters that belong to the other optimizers alone require no gradient."""
        own = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        changed = [
            parameter
            for optimizer in self._siblings
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) not in own and parameter.requires_grad
        ]
        for parameter in changed:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in changed:
                parameter.requires_grad = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled, it is the wrapper of an optimizer that no Trainer has bound yet."""
        return LightningOptimizer, (self._optimizer,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def __repr__(self) -> str:
        return f"Lightning{self._optimizer!r}"
