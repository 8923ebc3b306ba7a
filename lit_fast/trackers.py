"""A number of things counted, as Lightning's loops show it: read when asked for, moved where a program writes it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

ALL = ("ready", "completed", "started", "processed")
DONE = ("ready", "completed")  # what is counted of things that only happen or do not
BEGUN = (*DONE, "started")


class Count:
    """One number of a `Tracker`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tracker: Any, owner: type | None = None) -> Any:
        return self if tracker is None else tracker.read(self.name)

    def __set__(self, tracker: Any, value: int) -> None:
        tracker.write(self.name, value)


class Tracker:
    """How many of something were about to begin (`ready`), have begun, are done, and are done with their last hooks."""

    ready, started, processed, completed = Count(), Count(), Count(), Count()

    def __init__(self, read: Callable[[str], int], move: Callable[[int], None] | None = None) -> None:
        self.read = read
        self._move = move

    def write(self, name: str, value: int) -> None:
        """What is counted is moved by as much as `name` has to change, so the others move along.

        Raises:
            AttributeError: this one cannot be moved, or not while an epoch runs.
        """
        if value == self.read(name):
            return
        if self._move is None:
            raise AttributeError(
                f"{name!r} of this progress follows from what the loop does; it cannot be set to {value}."
            )
        self._move(value - self.read(name))

    def reset(self) -> None:
        self.write("completed", 0)

    def increment_by(self, n: int) -> None:
        self.write("completed", self.read("completed") + n)

    def state_dict(self, counted: tuple[str, ...] = ALL) -> dict[str, int]:
        return {name: self.read(name) for name in counted}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.write("completed", state_dict["completed"])

    def __repr__(self) -> str:
        return ", ".join(f"{name}={self.read(name)}" for name in ("ready", "started", "processed", "completed"))


class ProgressView:
    """`total` counts over the whole fit, `current` over the running epoch (or run)."""

    def __init__(self, total: Tracker, current: Tracker | None = None, counted: tuple[str, ...] = ALL) -> None:
        self.total = total
        self.current = total if current is None else current
        self.counted = counted

    def reset(self) -> None:
        self.total.reset()
        self.current.reset()

    def reset_on_run(self) -> None:
        self.current.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.state_dict(self.counted), "current": self.current.state_dict(self.counted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total.load_state_dict(state_dict["total"])
        self.current.load_state_dict(state_dict["current"])

    def __repr__(self) -> str:
        return f"total: {self.total}; current: {self.current}"


class BatchProgressView(ProgressView):
    """... and whether the batch that runs, or ran last, is the last one."""

    def __init__(self, total: Tracker, current: Tracker, is_last_batch: Callable[[], bool]) -> None:
        super().__init__(total, current)
        self._is_last_batch = is_last_batch

    @property
    def is_last_batch(self) -> bool:
        return self._is_last_batch()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "is_last_batch": self.is_last_batch}


class Namespace(SimpleNamespace):
    """A few views by name, and nothing else."""
