"""A clock of steps that stops at the borders of windows: between two steps, where no phase is open.

So a window's time holds whole steps, and nothing of what is done at a border.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lit_fast.profiler.step import StepProfiler

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

WINDOWS = 20  # that count; one before them warms up
FEWEST = 5  # below, an interval says nothing


class Borders(StepProfiler):
    """Our side's clock, with a visitor between two steps wherever a window ends. It prints nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(show=False, **options)
        self.left = 0  # micro-batches of the running window

    def visit(self) -> int:
        """Called before a window; returns how many micro-batches it has."""
        raise NotImplementedError

    def wrap_batches(self, batches: Iterator[Any], phase: str = "data") -> Iterator[Any]:
        timed = super().wrap_batches(batches, phase)
        while True:
            if not self.left:
                self._clock.pause("profiling")  # between two steps, and in none of their phases
                try:
                    self.left = self.visit()
                finally:
                    self._clock.resume()
            for batch in islice(timed, self.left):
                self.left -= 1
                yield batch
            if self.left:  # the epoch ended within a window
                return


class FirstSteps(Borders):
    """Records a fit, which it ends after so many windows, and each of them by itself.

    Args:
        trainer: of the fit.
        size: micro-batches of a window.
        windows: how many.
        options: of `StepProfiler`.
    """

    def __init__(self, trainer: Trainer, size: int, windows: int, **options: Any) -> None:
        super().__init__(**options)
        self.trainer, self.size, self.wanted = trainer, size, windows
        self.windows: list[dict[str, float]] = []  # seconds a step, by phase
        self._last: dict[str, float] | None = None

    def visit(self) -> int:
        now = seconds(self, self.trainer.config.device)
        if self._last is not None:
            self.windows.append(a_step(self._last, now, self.size))
        self._last = now
        if len(self.windows) == self.wanted:
            self.trainer.should_stop = True  # the loop looks after a step: one more
            return 1
        return self.size

    @property
    def ended_it(self) -> bool:
        """Whether the fit might have gone on."""
        return len(self.windows) >= self.wanted


def seconds(clock: StepProfiler, device: torch.device) -> dict[str, float]:
    """By phase until now, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock.phases()


def a_step(before: Mapping[str, float], after: Mapping[str, float], size: int) -> dict[str, float]:
    """Seconds a step by phase, of the `size` steps between two readings."""
    return {name: (value - before.get(name, 0.0)) / size for name, value in after.items()}
