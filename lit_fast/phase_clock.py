"""The compiled clock of a run's phases. Import it from `lit_fast.ops`.

It times calls, blocks and iterators that were wrapped when they were bound: a wrapped call is an object of a C type
that reads the clock before and after. Time belongs to the innermost of them, and what no phase claims to the last one,
so that the phases add up to the wall time to the nanosecond.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lit_fast import _core
from lit_fast.errors import KernelError, ProfileError

T = TypeVar("T")

MOST_PARTS = 500  # of a phase, with names of their own: a profile's size does not grow with a run
OTHERS = "(others)"
_clocks: weakref.WeakSet[PhaseClock] = weakref.WeakSet()
OFTEN = 64  # objects that are made in less than 0.1 ms, before others may run


@dataclass(frozen=True)
class Spread:
    """Durations in ns on the grid of profiler/record.py."""

    count: int
    total: int
    minimum: int
    maximum: int
    buckets: dict[int, int]


class PartTime(NamedTuple):
    phase: str
    name: str
    total: int  # ns
    calls: int
    longest: int  # ns, of a call


class SlowStepTime(NamedTuple):
    step: int
    duration: int  # ns
    begin: int  # ns since the run's
    phases: dict[str, int]  # ns
    interruptions: dict[str, int]  # ns
    longest_part: tuple[str, str] | None  # phase and name of the part that had the longest call
    longest: int  # ns of that call


class SpanTime(NamedTuple):
    phase: str
    part: str | None
    step: int
    begin: int  # ns since the run's
    duration: int  # ns


class Reading(NamedTuple):
    """What a clock has recorded."""

    wall: int  # ns
    steps_begun: int
    phases: dict[str, tuple[int, int]]  # ns, calls
    parts: list[PartTime]
    steps: Spread
    per_step: dict[str, Spread]  # of the steps in which a phase took any time
    slowest: list[SlowStepTime]  # the slowest first
    interruptions: dict[str, int]  # ns


class PhaseClock:
    """A clock that attributes time to phases and to named parts of them, and knows where steps begin.

    Only the thread that calls `start` is timed; calls from others pass through. Memory does not grow with steps.

    Args:
        phases: their names; the last one is what no other claims.
        interruptions: kinds of things that stop a step inside whatever phase it is in.
        slowest_kept: how many of the slowest steps are kept.
        spans_kept: how many of the last timed calls are kept for a timeline.

    Raises:
        ProfileError: a phase or kind of interruption that was not named here.

    Example:
        >>> clock = PhaseClock(["work", "rest"])
        >>> clock.start("rest")
        >>> clock.wrap("work", sum)([1, 2])
        3
        >>> clock.stop()
        >>> reading = clock.read()
        >>> sum(nanoseconds for nanoseconds, _ in reading.phases.values()) == reading.wall
        True
    """

    def __init__(
        self, phases: Sequence[str], interruptions: Sequence[str] = (), slowest_kept: int = 10, spans_kept: int = 4096
    ) -> None:
        if not hasattr(_core, "PhaseClock"):
            raise KernelError("The compiled core is older than lit_fast's Python files: build it again.")
        if not phases or slowest_kept < 1 or spans_kept < 1:
            raise ProfileError("A PhaseClock has at least one phase, and keeps at least one slow step and one span.")
        self.phases, self.interruptions = tuple(phases), tuple(interruptions)
        self._core = _core.PhaseClock(len(self.phases), len(self.interruptions), slowest_kept, spans_kept)
        self._slots: dict[tuple[str, str | None], int] = {(name, None): n for n, name in enumerate(self.phases)}
        self._parts = dict.fromkeys(self.phases, 0)
        self._runs = self._paused = False
        _clocks.add(self)

    def start(self, phase: str) -> None:
        """Begin, on this thread, with nothing recorded; time belongs to `phase` where nothing else claims it."""
        self._core.start(self._slot(phase, None))
        self._runs, self._paused = True, False

    def stop(self) -> None:
        """End the wall clock, and a step that goes on; what is called from here on is not timed."""
        self._core.stop()
        self._runs = False

    def wrap(self, phase: str, function: Callable[..., T], part: str | None = None) -> Callable[..., T]:
        """`function`, timed; it has the attributes of `function`."""
        return self._core.wrap(self._slot(phase, part), function)

    def block(self, phase: str, part: str | None = None) -> AbstractContextManager[None]:
        """A context whose time belongs to `phase`; good for one `with` block at a time."""
        return self._core.block(self._slot(phase, part))

    def items(self, phase: str, iterator: Iterator[T], part: str | None = None) -> Iterator[T]:
        """The same items; waiting for each belongs to `phase`."""
        return self._core.items(self._slot(phase, part), iterator, False, None)

    def steps(self, phase: str, iterator: Iterator[T], first: Callable[[T], None] | None = None) -> Iterator[T]:
        """The same items; waiting for each belongs to `phase` and begins a step. `first` is shown the first item."""
        return self._core.items(self._slot(phase, None), iterator, True, first)

    def end_step(self) -> None:
        """The step that goes on, if one does, ends here and not where the next one begins."""
        self._core.end_step()

    def pause(self, phase: str) -> None:
        """All time until `resume` belongs to `phase`: calls are not timed, and a step that goes on ends."""
        self._core.pause(self._slot(phase, None))
        self._paused = True

    def resume(self) -> None:
        """Go on timing; nothing happens where the clock was not paused."""
        self._core.resume()
        self._paused = False

    @property
    def counts(self) -> bool:
        """Whether time counts now, for phases and steps: the clock runs, and is not paused."""
        return self._runs and not self._paused

    def interrupted(self, kind: str, nanoseconds: int) -> None:
        """Something stopped the step for that long; the time stays with the phase that it fell into."""
        if kind not in self.interruptions:
            raise ProfileError(f"This clock knows no interruption {kind!r}, only: {', '.join(self.interruptions)}.")
        self._core.interrupted(self.interruptions.index(kind), nanoseconds)

    def read(self, between: Callable[[], object] = lambda: None) -> Reading:
        """What was recorded until now, also while it runs, and from any thread; `between` is called now and then."""
        read = self._core.read()
        between()
        names = list(self._slots)
        totals = dict.fromkeys(self.phases, (0, 0))
        parts = []
        for number, ((phase, part), (_, total, calls, longest)) in enumerate(zip(names, read["slots"], strict=False)):
            before, times = totals[phase]
            totals[phase] = before + total, times + calls
            if part is not None and calls:
                parts.append(PartTime(phase, part, total, calls, longest))
            if number % OFTEN == 0:
                between()
        slowest = [
            SlowStepTime(
                step,
                duration,
                begin,
                {name: n for name, n in zip(self.phases, phases, strict=True) if n},
                {name: n for name, n in zip(self.interruptions, stops, strict=True) if n},
                _named(names[slot]) if slot >= 0 else None,
                longest,
            )
            for step, duration, begin, phases, stops, slot, longest in read["slowest"]
        ]
        between()
        return Reading(
            read["wall"],
            read["steps_begun"],
            totals,
            parts,
            Spread(*read["steps"]),
            {name: Spread(*spread) for name, spread in zip(self.phases, read["per_step"], strict=True)},
            slowest,
            dict(zip(self.interruptions, read["interruptions"], strict=True)),
        )

    def spans(self, steps: int = 64, between: Callable[[], object] = lambda: None) -> list[SpanTime]:
        """The timed calls of the last `steps` steps that are still kept, in the order in which they ended."""
        kept, names, spans = self._core.spans(steps), list(self._slots), []
        between()
        for slot, step, begin, took in kept:
            spans.append(SpanTime(*names[slot], step, begin, took))
            if len(spans) % OFTEN == 0:
                between()
        return spans

    def _slot(self, phase: str, part: str | None) -> int:
        slot = self._slots.get((phase, part))
        if slot is not None:
            return slot
        if phase not in self._parts:
            raise ProfileError(f"There is no phase {phase!r}; there are: {', '.join(self.phases)}.")
        if self._parts[phase] == MOST_PARTS:
            return self._slot(phase, OTHERS) if part != OTHERS else self._add(phase, OTHERS)
        self._parts[phase] += 1
        return self._add(phase, part)

    def _add(self, phase: str, part: str | None) -> int:
        slot = self._slots[phase, part] = self._core.add_part(self.phases.index(phase))
        return slot


def _named(slot: tuple[str, str | None]) -> tuple[str, str] | None:
    phase, part = slot
    return None if part is None else (phase, part)


def _begin_child() -> None:
    """A forked process, such as a loader's worker: it has no part in the run, nor the thread that may hold a lock."""
    for clock in _clocks:
        clock._core.begin_child()
        clock._runs = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def bucket_of(nanoseconds: int) -> int:
    """The histogram's index of a duration, as the core computes it; record.bucket_of says how."""
    if not 0 <= nanoseconds < 1 << 63:
        raise ProfileError(f"{nanoseconds} ns is no duration of a clock: from 0 to 2**63 - 1.")
    return _core.bucket_of(nanoseconds)
