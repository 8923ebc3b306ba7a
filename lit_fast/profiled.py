"""What a profiler is told of a run, and how: bound where a profiler is asked for, and nothing otherwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lit_fast.errors import MisconfigurationException
from lit_fast.profiler.actions import recorded


class Profiled:
    """The part of a `Trainer` that its profiler concerns."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _use_profiler(self, given: Any) -> None:
        """`_profiler` times the phases of the step, `_actions` is told of named actions: one of them, or neither."""
        self._profiler = self._actions = self._shown_profiler = None
        if given is None:
            return
        from lit_fast import profiler as room

        kinds = {"simple": "Simple", "advanced": "Advanced", "pytorch": "PyTorch", "step": "Step", "deep": "Deep"}
        kind = kinds.get(given.lower()) if isinstance(given, str) else None
        made = given if kind is None else getattr(room, f"{kind}Profiler")()  # no other one is imported
        if isinstance(made, room.StepProfiler):
            self._profiler = made
        elif isinstance(made, room.Profiler):
            self._actions = None if type(made) is room.PassThroughProfiler else made
        else:
            later = "is not built" if given == "xla" else "is unknown"
            raise MisconfigurationException(
                f"Trainer(profiler={given!r}) {later}; allowed: None, 'step' (where the time of a step goes), "
                f"'deep' (and why), 'simple', 'advanced', 'pytorch', or an instance of a lit_fast.profiler.Profiler."
            )
        self._shown_profiler = made

    def _hook(self, owner: Any, name: str) -> Callable[..., Any]:
        """A method of the module, the datamodule or a callback, by its name where a profiler records that."""
        return self._timed(owner, name, self._method(owner, name))

    def _method(self, owner: Any, name: str) -> Callable[..., Any]:
        """The same, for whoever times it with what is bound around it."""
        method: Callable[..., Any] = getattr(owner, name)
        return method if self._actions is None else recorded(self._actions, self._action(owner, name), method)

    def _timed(self, owner: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which calls that method of `owner`, timed under its name where a profiler times the step."""
        if self._profiler is None:
            return function
        wrap: Callable[..., Callable[..., Any]] = self._profiler.wrap_hook
        return wrap(name, function, self._action(owner, name), getattr(owner, name))

    def _in_phase(self, name: str, part: str | None = None) -> AbstractContextManager[None]:
        """A block whose time belongs to a phase, where a profiler times the step."""
        return nullcontext() if self._profiler is None else self._profiler.phase(name, part)

    def _action(self, owner: Any, name: str) -> str:
        if owner is self._module:
            return f"[LightningModule]{type(owner).__name__}.{name}"
        if owner is self.datamodule:
            return f"[LightningDataModule]{type(owner).__name__}.{name}"
        return f"[Callback]{owner.state_key}.{name}"

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the module's hook `name`, as that action."""
        return (
            function if self._actions is None else recorded(self._actions, self._action(self._module, name), function)
        )

    def _strategy_action(self, name: str) -> str:
        return f"[Strategy]{type(self.strategy).__name__}.{name}"
