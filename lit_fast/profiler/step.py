"""Where the wall time of a run goes, cheap enough to leave on. The plan's callables are wrapped when they are bound:
switched off, it costs nothing.

Each moment belongs to the innermost phase (a checkpoint written inside a hook is no time of the hook's), so that the
phases add up to the wall time exactly. Times are the host's; on a GPU they show what the host waited for, and the
device's own stand beside them (device_clock.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fast import ops
from lit_fast.distributed.flights import PHASE, Flights
from lit_fast.profiler import device_clock, header, interruptions
from lit_fast.profiler import export as exports
from lit_fast.profiler.causes import Usual, causes_of
from lit_fast.profiler.collectives import TRACK, spans_of
from lit_fast.profiler.record import PHASES, Device, Distribution, Header, Part, Phase, Profile, SlowStep, Span
from lit_fast.profiler.writer import PeriodicWriter, apart_from_the_run, in_pieces, let_others_run

if TYPE_CHECKING:
    from lit_fast.strategies.strategy import Strategy
    from lit_fast.trainer import Trainer

UNEXPLAINED = PHASES[-1]
STEPS_SHOWN = 64  # the last ones, on the timeline

# Hooks whose time is not "hooks".
HOOK_PHASES = {
    "prepare_data": "setup",
    "setup": "setup",
    "configure_callbacks": "setup",
    "configure_optimizers": "setup",
    "teardown": "setup",
    "train_dataloader": "data",
    "val_dataloader": "validation",
    "test_dataloader": "validation",
    "predict_dataloader": "validation",
    "transfer_batch_to_device": "transfer",
    "configure_gradient_clipping": "optimizer",
    "optimizer_zero_grad": "optimizer",
}


class StepProfiler:
    """Adds up the time of each phase of a run, and of every hook in it; spreads it over steps, and keeps the slowest.

    What it records is of a fixed size, whatever the number of steps. A step is one batch: from where it is fetched to
    where the next one is.

    Args:
        dirpath: where each process writes what it has recorded, as `rank-00000.json` (`profiler/record.py` says what
            is in it): at the end of the run, and while it goes on. A fit writes there, other runs into a folder of
            their name below. Nothing is written where it is None.
        write_every: seconds between two such files; what a process had written is there after it was killed.
        show: print what was recorded at the end of a fit, in the first process.
        export: where figures go while the run goes on: "prometheus://HOST:PORT", where they can be asked for,
            "otlp://HOST:PORT", a collector that they are sent to, or "file:///PATH.prom" (profiler/export.py says
            which).

    Raises:
        MisconfigurationException: `export` is no such address.

    Example::

        trainer = Trainer(max_steps=100, profiler="step")
        trainer.fit(model, loader)
        for phase, seconds in trainer.profiler.phases().items():
            print(f"{phase:<14} {seconds:8.3f} s")
    """

    mode = "step"
    marks_device = True  # whether a GPU's own times are measured, too

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        write_every: float = 5.0,
        export: str | None = None,
        show: bool = True,
    ) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.write_every, self.show, self.export = write_every, show, export
        if export is not None:
            exports.check(export)
        self._renew()

    def _renew(self) -> None:
        self._clock = ops.PhaseClock(PHASES, (interruptions.COLLECTION, interruptions.COMPILATION))
        self._on_device: device_clock.DeviceClock | None = None  # on a GPU, in a run
        self._where: dict[tuple[str, str], str] = {}  # file:line of parts
        self._bytes: dict[tuple[str, str], float] = {}  # written by them
        self._flights = Flights(self.wrap, self.phase, lambda: self._clock.counts)
        self._header = Header(mode=self.mode)
        self._trainer: Trainer | None = None  # while it runs
        self._first_batch: header.Batch | None = None
        self._running = False
        self._ended_by: str | None = None
        self._system_clock = 0.0  # at the start; once it has ended, what has passed by it
        self._writer: PeriodicWriter | None = None
        self._exporter: exports.Exporter | None = None
        self._watched = ExitStack()  # that looks for interruptions

    def __getstate__(self) -> dict[str, Any]:
        """Its options: a copy, or one in another process, records a run of its own."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._renew()

    # -- measuring

    def start(self, trainer: Trainer | None = None) -> None:
        """Begin the wall clock, on this thread, and forget an earlier run. What no phase claims is "setup" at first."""
        self.stop()
        self._header = Header(mode=self.mode, started=datetime.now(timezone.utc).isoformat(timespec="seconds"))
        self._first_batch, self._ended_by, self._trainer = None, None, trainer
        self._bytes = {}
        if trainer is not None:
            with apart_from_the_run("A profile's header is not complete"):
                header.begin(self._header, trainer)
            self._watched = interruptions.watch(self._clock)
        if trainer is not None and self.marks_device:
            self._on_device = device_clock.of(trainer.config.device, self._on_device)
        self._running, self._system_clock = True, time.time()
        self._clock.start("setup" if trainer is not None else UNEXPLAINED)
        self._flights.begin(on_host=trainer is None or trainer.config.device.type == "cpu")
        if trainer is not None and self.dirpath is not None:
            self._writer = PeriodicWriter(self.profile, self._path(trainer), self.write_every)
            self._writer.start()
        if trainer is not None and self.export is not None:
            labels = {"rank": str(self._header.rank), "host": self._header.host}
            read = partial(self._clock.read, let_others_run)
            source = exports.Source(read, self._devices, self._samples, labels)
            self._exporter = exports.start(self.export, source, trainer.strategy.local_rank)

    def _samples(self) -> float | None:
        return None if self._first_batch is None else self._first_batch.samples

    def _devices(self) -> list[Device]:
        """What sensors have told so far."""
        return []

    def _path(self, trainer: Trainer) -> Path:
        assert self.dirpath is not None
        run = "" if trainer.state.fn is None or trainer.state.fn.value == "fit" else trainer.state.fn.value
        return self.dirpath / run / f"rank-{trainer.strategy.global_rank:05d}.json"

    def failed(self, error: BaseException) -> None:
        """An exception ends the run."""
        self._ended_by = type(error).__name__

    def stop(self) -> None:
        """End the wall clock, and write the file where one is wanted."""
        if not self._running:
            return
        self._clock.stop()
        if self._on_device is not None:
            self._on_device.finish(wait=self._ended_by is None)
        self._running, self._system_clock = False, time.time() - self._system_clock
        self._watched.close()
        trainer = self._trainer
        if trainer is not None:
            self._complete(trainer)
        if self._exporter is not None:
            self._exporter.stop()
            self._exporter = None
        self._trainer = self._first_batch = None
        if self._writer is not None:
            self._writer.end()
            self._writer = None
        if self.show and trainer is not None and trainer.state.fn == "fit" and self._ended_by is None:
            with apart_from_the_run("The profile could not be shown"):
                self._show()

    def _complete(self, trainer: Trainer) -> None:
        with apart_from_the_run("A profile's header is not complete"):
            header.complete(self._header, trainer, self._first_batch)

    def _show(self) -> None:
        if self._header.rank != 0:
            return
        from lit_fast.profiler.merge import of_profiles
        from lit_fast.profiler.report.terminal import print_report

        print_report(of_profiles([self.profile()]))

    def wrap(
        self, phase: str, function: Callable[..., Any], part: str | None = None, of: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """`function`, its time added to `phase`, and to the part of that name. `of` is where the part is defined."""
        if part is not None and (phase, part) not in self._where:
            self._where[phase, part] = header.where(function if of is None else of)
        if self._on_device is not None:
            function = self._on_device.wrap(phase, function)
        return self._clock.wrap(phase, function, part)

    def watch(self, strategy: Strategy) -> None:
        """Time what a run asks of its strategy, and what that sends to other processes."""
        strategy.watch(self.wrap, self._flights)

    def wrap_hook(self, hook: str, function: Callable[..., Any], part: str, of: Callable[..., Any]) -> Any:
        """`function`, which calls the hook `of`, named `hook`."""
        return self.wrap(HOOK_PHASES.get(hook, "hooks"), function, part, of)

    def phase(self, name: str, part: str | None = None) -> AbstractContextManager[None]:
        """The time inside belongs to phase `name`, and to the part of that name.

        Raises:
            ProfileError: there is no such phase; record.PHASES holds them.
        """
        return self._clock.block(name, part)

    def wrap_batches(self, batches: Iterator[Any], phase: str = "data") -> Iterator[Any]:
        """The same batches; waiting for each one is "data", and begins a step."""
        batches = iter(batches)
        if self._on_device is not None:
            batches = self._on_device.steps(phase, batches)
        return self._clock.steps(phase, batches, self._note_batch)

    def bind_run(self, run: Callable[..., None], last: bool) -> Callable[..., None]:
        """What a plan runs one batch by; `last` of those that an optimizer's step is for."""
        return run

    def wrap_items(self, phase: str, items: Iterator[Any], part: str | None = None) -> Iterator[Any]:
        """The same items; waiting for each one belongs to `phase`."""
        items = iter(items)
        if self._on_device is not None:
            items = self._on_device.items(phase, items)
        return self._clock.items(phase, items, part)

    def pause(self, phase: str) -> None:
        """Until `resume` all time belongs to that phase, and to no step."""
        self._clock.pause(phase)
        if self._on_device is not None:
            self._on_device.paused = True

    def resume(self) -> None:
        self._clock.resume()
        if self._on_device is not None:
            self._on_device.paused = False

    def wrote(self, phase: str, part: str, size: float) -> None:
        """Count bytes that a part has written."""
        key = (phase, part)
        if key in self._bytes or len(self._bytes) < ops.MOST_PARTS:
            self._bytes[key] = self._bytes.get(key, 0.0) + size

    def end_step(self) -> None:
        """The last step of an epoch ends here: what comes before the next one is fetched is not of it."""
        self._clock.end_step()

    def _note_batch(self, batch: Any) -> None:
        if self._trainer is not None and self._first_batch is None:
            self._first_batch = header.Batch(type(batch).__name__, None)
            with apart_from_the_run("A profile does not know its batch"):
                self._first_batch = header.Batch.of(batch)

    # -- reading

    @property
    def wall(self) -> float:
        """Seconds from `start()` to `stop()`, or until now."""
        return self._clock.read().wall * 1e-9

    def phases(self) -> dict[str, float]:
        """Seconds by phase; "unexplained" is what no phase claims, so the values add up to `wall`."""
        return {name: ns * 1e-9 for name, (ns, _) in self._clock.read().phases.items()}

    def step_costs(self) -> dict[str, float]:
        """Microseconds a step, for the phases that ran in one."""
        reading = self._clock.read()
        steps = reading.steps.count
        return {name: spread.total / steps * 1e-3 for name, spread in reading.per_step.items() if spread.count}

    def profile(self) -> Profile:
        """Everything that was recorded until now, also while the run goes on."""
        reading, passed = self._clock.read(let_others_run), self._system_clock
        if self._running:
            passed = time.time() - passed
            if self._trainer is not None and self._first_batch is not None:
                self._complete(self._trainer)
        let_others_run()
        moved, hidden = self._flights.bytes, self._flights.hidden
        typical = {name: _distribution(spread) for name, spread in reading.per_step.items()}
        device = device_clock.DeviceTimes() if self._on_device is None else self._on_device.read()
        steps = _distribution(reading.steps)
        let_others_run()
        usual = Usual.of(steps, typical)
        let_others_run()
        profile = Profile(
            header=replace(self._header, notes=[*self._header.notes, *device.notes]),
            wall=reading.wall * 1e-9,
            clock_check=passed if reading.wall else None,
            finished=not self._running and self._ended_by is None and reading.wall > 0,
            ended_by=self._ended_by,
            steps=steps,
            overlapped=None if hidden is None else hidden * 1e-9,
            phases=[
                Phase(name, ns * 1e-9, n, typical[name], device.phases.get(name, Distribution()))
                for name, (ns, n) in reading.phases.items()
                if n or ns or name in device.phases
            ],
            device_steps=device.steps,
            own_cost=_own_cost(reading, device.cost),
        )
        let_others_run()
        profile.slowest = in_pieces(partial(_slow_step, usual=usual), reading.slowest)
        profile.parts = in_pieces(partial(self._part, moved=moved), reading.parts)
        timed = self._clock.spans(STEPS_SHOWN, let_others_run)
        profile.timeline = [*in_pieces(_span, timed), *spans_of(self._flights, timed)]
        if abs(passed - profile.wall) > 1.0 + 0.01 * profile.wall:
            profile.warnings.append(
                f"The system's clock jumped: {passed:.1f} s went by on it, {profile.wall:.1f} s by the steady clock, "
                f"which all figures here are of. The machine slept, or its time was set."
            )
        return profile

    def _part(self, part: ops.PartTime, moved: dict[str, float]) -> Part:
        key = (part.phase, part.name)
        size = moved.get(part.name) if part.phase == PHASE else self._bytes.get(key)
        return Part(*key, part.total * 1e-9, part.calls, self._where.get(key) or None, part.longest * 1e-9, size)


def _distribution(spread: ops.Spread) -> Distribution:
    if not spread.count:
        return Distribution()
    return Distribution(spread.count, spread.total * 1e-9, spread.minimum * 1e-9, spread.maximum * 1e-9, spread.buckets)


def _slow_step(slow: ops.SlowStepTime, usual: Usual) -> SlowStep:
    phases = {name: ns * 1e-9 for name, ns in slow.phases.items()}
    return SlowStep(slow.step, slow.duration * 1e-9, phases, causes_of(slow, usual), slow.begin * 1e-9)


def _own_cost(reading: ops.Reading, marks: float) -> float | None:
    """Timed calls of a step, times what the clock takes for one of them on this machine, and a device's marks."""
    calls = sum(calls for _, calls in reading.phases.values())
    return calls / reading.steps.count * _cost_of_a_call() + marks if reading.steps.count else None


@cache
def _cost_of_a_call() -> float:
    """s, the least of a few rounds: a call that is timed beside one that is not."""

    def nothing() -> None: ...

    clock = ops.PhaseClock(["all"])
    clock.start("all")
    costs = []
    for function in (clock.wrap("all", nothing), nothing):
        rounds = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(200):
                function()
            rounds.append((time.perf_counter() - began) / 200)
        costs.append(min(rounds))
    return max(costs[0] - costs[1], 0.0)


def _span(span: ops.SpanTime) -> Span:
    track = "phases" if span.part is None else TRACK if span.phase == PHASE else "hooks"
    name = f"waiting: {span.part}" if track == TRACK else span.part or span.phase
    return Span(track, name, span.begin * 1e-9, span.duration * 1e-9, span.step)
