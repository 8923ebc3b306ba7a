"""Wall time by phase of the step. The plan's callables are wrapped when they are bound: switched off, it costs nothing.

Phases nest (a checkpoint is written inside a hook): each moment belongs to the innermost one, so that the phases and
the rest ("other") add up to the wall time exactly. Times are the host's; on a GPU they show what the host waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

PHASES = (
    "data",
    "transfer",
    "forward",
    "backward",
    "optimizer",
    "schedulers",
    "hooks",
    "logging",
    "checkpoint",
    "validation",
)


class StepProfiler:
    """Adds up the time of each phase, from the first phase that starts to `stop()`.

    Example::

        trainer = Trainer(max_steps=100, profiler="step")
        trainer.fit(model, loader)
        for phase, seconds in trainer.profiler.phases().items():
            print(f"{phase:<12} {seconds:8.3f} s")
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._calls = dict.fromkeys(PHASES, 0)
        self._stack: list[str] = []
        self._since = 0.0
        self._began: float | None = None
        self._ended: float | None = None

    # -- measuring

    def start(self) -> None:
        """Begin the wall clock (and forget an earlier run)."""
        StepProfiler.__init__(self)
        self._began = self._since = perf_counter()

    def stop(self) -> None:
        """End the wall clock."""
        self._ended = perf_counter()

    def _enter(self, phase: str) -> None:
        now = perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._stack.append(phase)
        self._calls[phase] += 1
        self._since = now

    def _leave(self) -> None:
        now = perf_counter()
        self._seconds[self._stack.pop()] += now - self._since
        self._since = now

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `phase`."""

        def timed(*args: Any) -> Any:
            self._enter(phase)
            try:
                return function(*args)
            finally:
                self._leave()

        timed.__qualname__ = getattr(function, "__qualname__", phase)
        return timed

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside belongs to phase `name`."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def wrap_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; waiting for each one is "data"."""
        fetch = self.wrap("data", batches.__next__)
        while True:
            try:
                batch = fetch()
            except StopIteration:
                return
            yield batch

    # -- reading

    @property
    def wall(self) -> float:
        """Seconds from `start()` to `stop()`, or until now."""
        if self._began is None:
            return 0.0
        return (self._ended if self._ended is not None else perf_counter()) - self._began

    def phases(self) -> dict[str, float]:
        """Seconds by phase; "other" is what no phase claims, so the values add up to `wall`."""
        seconds = dict(self._seconds)
        seconds["other"] = self.wall - sum(seconds.values())
        return seconds

    def step_costs(self) -> dict[str, float]:
        """Microseconds a step, for the phases that ran."""
        steps = self._calls["forward"]
        return {name: s / steps * 1e6 for name, s in self._seconds.items() if steps and self._calls[name]}
