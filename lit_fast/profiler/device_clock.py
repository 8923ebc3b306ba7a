"""The device's own time of each phase of a step: CUDA events on its stream, read once the device has passed them.

A *mark* is an event with the phase that begins there; it lasts until the next mark. The device comes to a mark when all
that was launched before it has run. So a phase's time is that from where the stream comes to its beginning to where it
comes to its end: its kernels, what they wait for (a copy, another process), and the gaps in which the host has not
launched the next of them yet. As on the host, time belongs to the innermost phase, and the phases of a step add up.

**Idle** is what lies between phases, and in those that give a device nothing to do ("data", "schedulers", "loop"): the
stream was done with one phase and the host had not begun the next. It is 0 where the host runs ahead of the device.
It does not show gaps between the kernels inside a phase (a deep profile does), and takes for idle what runs on other
streams only. What comes between steps (a log row, validation, a checkpoint) is in no step here.

**No step waits.** `cudaEventQuery` asks, at the beginning of a step and on its thread (another thread's question would
break a CUDA graph that is being captured), whether the device has come to the end of an earlier one. A device that is
so far behind that all `EVENTS` are under way costs steps their measurement, not their speed; and where marks would
take more than a hundredth of a step, only so many steps are measured, drawn at random, as keep to that on average.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar

import torch

from lit_fast.profiler.record import Distribution

T = TypeVar("T")

EVENTS = 512  # in the pool, at most; a step takes 15, and 2 for each hook, clipping in place, bucket waited for
SHARE = 0.01  # of a step that its marks may take
IDLE = "idle"
_STEP = "loop"  # the phase around a step's own code: where it ends, the step does
_WITHOUT_WORK = {"data", "schedulers", _STEP}  # of these the device sees nothing


@dataclass
class DeviceTimes:
    """What was measured so far."""

    phases: dict[str, Distribution] = field(default_factory=dict)  # s, of the measured steps that had that phase
    steps: Distribution = field(default_factory=Distribution)  # s from a step's first mark to its last
    ended: int = 0  # steps for the host, measured or not
    cost: float = 0.0  # s of the host for a step, on average over all
    notes: list[str] = field(default_factory=list)


class DeviceClock:
    """Marks the phases of each step on a device's stream. Only the thread that runs the steps uses it, but for `read`.

    Args:
        device: whose stream that is; each step marks the one that is current when it begins.
        cuda: `torch.cuda`, or what behaves like its `Event` and `current_stream`.
        share: of a step that its marks may take; where they would take more, not all steps are measured.

    Example::

        clock = DeviceClock(torch.device("cuda"))
        forward = clock.wrap("forward", model)
        for batch in clock.steps("transfer", batches):
            forward(batch)
            clock.end_step()
        clock.finish()
        print(clock.read().phases["forward"].mean)
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, share: float = SHARE) -> None:
        self.device, self._cuda, self._share = device, cuda, share
        self._free: list[Any] = []
        self._made = 0
        self._price: float | None = None  # s of the host for a mark, and for reading it
        self._lock = threading.Lock()  # between a step that adds and a thread that reads
        self.start()

    def start(self) -> None:
        """Forget an earlier run."""
        self._stream: Any = None
        self._open: list[tuple[str, Any]] | None = None  # marks of the step that is measured now
        self._phase = IDLE
        self._passed: deque[list[tuple[str, Any]]] = deque()  # steps that have ended for the host
        self._failed: str | None = None
        self.paused = self._is_drawn = False  # the step that goes on is left out: by a deep look, by the draw
        self._ended = self._behind = self._drawn = self._marks = 0
        self._chance, self._typical = 1.0, 0.0  # that a step is measured; s of a step of late
        self._draw = random.Random(0)  # not the run's: it goes on as if nothing had been drawn
        self._phases: dict[str, Distribution] = {}
        self._steps = Distribution()

    # -- marking

    def wrap(self, phase: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, its time on the device that phase's; a step ends where a function of the phase "loop" does."""
        if phase == _STEP:
            return self._ending_a_step(function)
        phase = IDLE if phase in _WITHOUT_WORK else phase

        @wraps(function)
        def marked(*args: Any, **kwargs: Any) -> T:
            outer = self._phase
            if self._open is None or outer == phase:
                return function(*args, **kwargs)
            self._mark(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._mark(outer)

        return marked

    def items(self, phase: str, iterator: Iterator[T]) -> Iterator[T]:
        """The same items; while each is waited for it is that phase."""
        return _Items(self.wrap(phase, iterator.__next__))

    def steps(self, phase: str, iterator: Iterator[T]) -> Iterator[T]:
        """The same items; a step begins where each is asked for."""
        if self._price is None and not self.paused:
            self._price = self._measure_price()
        phase, fetch = IDLE if phase in _WITHOUT_WORK else phase, iterator.__next__

        def next_step() -> T:
            self._begin_step(phase)
            item = fetch()  # at the end of an epoch there is none, and no step: the next one to begin forgets it
            if phase != IDLE:
                self._mark(IDLE)
            return item

        return _Items(next_step)

    def end_step(self) -> None:
        """The host is done with a step; it is read when the device is, too."""
        if self._failed is None and not self.paused:
            self._ended += 1
            self._drawn += self._is_drawn
        self._mark(IDLE)
        if self._open is not None:
            self._passed.append(self._open)
            self._open = None

    def _ending_a_step(self, function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def step(*args: Any, **kwargs: Any) -> T:
            result = function(*args, **kwargs)
            self.end_step()
            return result

        return step

    def _begin_step(self, phase: str) -> None:
        self._leave_out()  # one that an exception went through
        if self._failed is not None or self.paused:
            return
        self._collect()
        self._is_drawn = self._chance < 1.0 and self._draw.random() >= self._chance
        if self._is_drawn:
            return
        self._stream = self._cuda.current_stream(self.device)
        self._open = []
        self._mark(phase)

    def _mark(self, phase: str) -> None:
        self._phase = phase
        if self._open is None:
            return
        if self._free:
            event = self._free.pop()
        elif self._made < EVENTS:
            event = self._cuda.Event(enable_timing=True)
            self._made += 1
        else:
            self._behind += 1
            self._leave_out()
            return
        self._open.append((phase, event))
        try:
            event.record(self._stream)
        except RuntimeError as error:  # the device is gone: the run's own call will say so
            self._fail(error)

    def _leave_out(self) -> None:
        """The step that goes on is not measured."""
        if self._open is not None:
            self._free += [event for _, event in self._open]
            self._open = None

    # -- reading

    def _collect(self) -> None:
        """Read the steps that the device has ended; a stream is in order, so the last mark speaks for all."""
        try:
            while self._passed and self._passed[0][-1][1].query():
                marks = self._passed.popleft()
                self._add(marks)
                self._free += [event for _, event in marks]
        except RuntimeError as error:
            self._fail(error)

    def _add(self, marks: list[tuple[str, Any]]) -> None:
        times: dict[str, float] = {}
        for (phase, begin), (_, end) in pairwise(marks):
            if phase != IDLE:  # half of them: what is left of the step
                times[phase] = times.get(phase, 0.0) + begin.elapsed_time(end) * 1e-3  # from ms
        took = marks[0][1].elapsed_time(marks[-1][1]) * 1e-3
        times[IDLE] = max(0.0, took - sum(times.values()))
        with self._lock:
            self._marks += len(marks)
            self._steps.add(took)
            for phase, seconds in times.items():
                self._phases.setdefault(phase, Distribution()).add(seconds)
        self._typical += (took - self._typical) * (0.1 if self._typical else 1.0)
        if self._price is not None:
            self._chance = min(1.0, self._share * self._typical / (self._price * len(marks)))

    def _fail(self, error: RuntimeError) -> None:
        self._failed = str(error).strip().split("\n")[0]
        self._open = None
        self._passed.clear()

    def _measure_price(self) -> float | None:
        """s of the host for a mark from first to last, the least of some rounds. It waits: no step has begun yet."""
        rounds, marks = [], 16
        for _ in range(4):
            began = time.perf_counter()
            self._begin_step(IDLE)
            for number in range(marks - 2):
                self._mark(IDLE if number % 2 else "forward")
            self.end_step()
            spent = time.perf_counter() - began
            if self._failed is not None:
                return None
            self._passed[-1][-1][1].synchronize()
            began = time.perf_counter()
            self._collect()
            rounds.append((time.perf_counter() - began + spent) / marks)
        self.start()
        return min(rounds)

    def finish(self, wait: bool = True) -> None:
        """The run has ended: read the rest of its steps, those too that the device is not done with where `wait`."""
        self._leave_out()
        try:
            if wait and self._passed:
                self._passed[-1][-1][1].synchronize()
        except RuntimeError as error:
            self._fail(error)
        self._collect()

    def read(self) -> DeviceTimes:
        """What was measured until now, from any thread."""
        with self._lock:
            phases = {name: _copied(spread) for name, spread in self._phases.items()}
            steps, marks = _copied(self._steps), self._marks
        ended = self._ended
        cost = (self._price or 0.0) * marks / ended if ended else 0.0
        return DeviceTimes(phases, steps, ended, cost, self._notes())

    def _notes(self) -> list[str]:
        notes = []
        if self._failed is not None:
            notes.append(f"the device's own time was measured until it failed: {self._failed}")
        if self._behind:
            notes.append(
                f"{self._behind} of {self._ended} steps are not in the device's own times: all {EVENTS} events were "
                f"under way, since the device was so far behind, or the step had more phases than that"
            )
        if self._drawn:
            notes.append(
                f"{self._drawn} of {self._ended} steps, drawn at random, are not in the device's own times: marking "
                f"all would have taken more than {self._share:.0%} of the time"
            )
        return notes


class _Items(Iterator[T]):
    """An iterator of what a function gives until it raises StopIteration."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._next = function

    def __next__(self) -> T:
        return self._next()


def _copied(spread: Distribution) -> Distribution:
    return Distribution(spread.count, spread.total, spread.minimum, spread.maximum, dict(spread.buckets))


def of(device: torch.device, before: DeviceClock | None) -> DeviceClock | None:
    """The clock for a run on that device, the one before again where it fits; None where the host's says it all."""
    if device.type != "cuda":
        return None
    if before is None or before.device != device:
        return DeviceClock(device)
    before.finish(wait=False)
    before.start()
    return before
