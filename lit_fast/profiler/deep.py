"""A closer look at a few steps of a run: kernels under the device's ceilings, memory, host reads, sensors.

After some first steps come one in which memory is sampled, one in which operations are counted and host reads are
found, and a window of steps under torch.profiler. Then plans run again what they would have run, and a step costs what
it costs with `StepProfiler`. None of these steps is in the times of phases and steps: the clock stands still for them,
and their time is the row "profiling".
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler import record_function

from lit_fast.errors import MisconfigurationException
from lit_fast.ops import PhaseClock
from lit_fast.optim.traffic import Pass, passes_of
from lit_fast.profiler.ceilings import measure_ceilings, peak_of
from lit_fast.profiler.costs import Costs
from lit_fast.profiler.kernels import STEP, Window, events_of
from lit_fast.profiler.memory import StepMemory
from lit_fast.profiler.record import Ceilings, Device, DeviceWindow, Kernel, Memory, Profile, Span, Sync
from lit_fast.profiler.sensors import Sensors
from lit_fast.profiler.step import StepProfiler
from lit_fast.profiler.syncs import Syncs
from lit_fast.profiler.throughput import compute_dtype
from lit_fast.profiler.writer import apart_from_the_run
from lit_fast.states import TrainerFn

if TYPE_CHECKING:
    from lit_fast.binding import StepPlan
    from lit_fast.trainer import Trainer

# CUPTI stays attached after a session otherwise, and slows every launch (pytorch issue 144455).
TEARDOWN = "TEARDOWN_CUPTI"
RANGE = "lit_fast "  # how the names of our ranges begin, in torch.profiler and for NVTX
_PHASES = {  # of the plan's points
    "receive": "transfer",
    "on_train_batch_start": "hooks",
    "training_step": "forward",
    "zero_grad": "optimizer",
    "on_before_backward": "hooks",
    "backward": "backward",
    "on_after_backward": "hooks",
    "on_before_optimizer_step": "hooks",
    "clip": "optimizer",
    "update": "optimizer",
    "optimizer_step": "optimizer",
    "schedulers": "schedulers",
    "on_train_batch_end": "hooks",
}

Run = Callable[["StepPlan", Any, int], None]


class DeepProfiler(StepProfiler):
    """What `StepProfiler` records, and a closer look at a few steps of a fit.

    Args:
        dirpath, write_every, export: as those of `StepProfiler`.
        skip: steps before that, at least one: the first allocate, compile, and fill caches.
        window: steps under torch.profiler. Two more come before them, for memory and for counting.
        sensors_every: seconds between two readings of the machine's sensors, for the whole run.

    Raises:
        MisconfigurationException: a number that is too small.

    Example::

        trainer = Trainer(max_steps=100, profiler="deep")
        trainer.fit(model, loader)
        for kernel in trainer.profiler.profile().kernels[:5]:
            print(f"{kernel.name:<40} {kernel.seconds / kernel.steps * 1e3:8.3f} ms a step")
    """

    mode = "deep"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        write_every: float = 5.0,
        skip: int = 5,
        window: int = 10,
        sensors_every: float = 1.0,
        export: str | None = None,
    ) -> None:
        for name, value, least in (("skip", skip, 1), ("window", window, 1), ("sensors_every", sensors_every, 0.01)):
            if value < least:
                raise MisconfigurationException(f"DeepProfiler({name}={value}): at least {least}.")
        self.skip, self.window, self.sensors_every = skip, window, sensors_every
        super().__init__(dirpath, write_every, export)

    def _renew(self) -> None:
        super()._renew()
        self._look: _Look | None = None  # while it is not over
        self._found = _Found()
        self._sensors: Sensors | None = None

    def start(self, trainer: Trainer | None = None) -> None:
        self.stop()
        self._look, self._found, self._sensors = None, _Found(), None
        super().start(trainer)
        if trainer is None:
            return
        device = trainer.config.device
        with self.phase("profiling"):
            with apart_from_the_run("No sensors are read"):
                self._sensors = Sensors(device, self.sensors_every).start()
            if trainer.state.fn == TrainerFn.FITTING:
                with apart_from_the_run("The machine's ceilings were not measured"):  # no memory for their buffers
                    self._found.ceilings = measure_ceilings(device)
                self._look = _Look(self, trainer, self._found)

    def stop(self) -> None:
        if not self._running:
            return
        if self._look is not None:
            self._look.cut_short()
            self._look = None
        if self._sensors is not None:
            with self.phase("profiling"):
                self._sensors.stop()
        super().stop()

    def bind_run(self, run: Run, last: bool) -> Run:
        """What runs one micro-batch until the look is over: then the plan runs `run` again."""

        def looked_at(plan: StepPlan, batch: Any, batch_idx: int) -> None:
            if self._look is None:
                plan.run = run
                run(plan, batch, batch_idx)
            else:
                self._look.run(run, plan, batch, batch_idx, last)

        return run if self._look is None else looked_at

    def over(self) -> None:
        """The look is over: from the next step on nothing of it runs."""
        self._look = None

    def _devices(self) -> list[Device]:
        return [] if self._sensors is None else self._sensors.devices()

    def profile(self) -> Profile:
        profile, found = super().profile(), self._found
        notes = [*profile.header.notes, *found.notes]
        if self._sensors is not None:
            profile.devices = self._devices()
            notes += self._sensors.notes
        profile.header = replace(profile.header, notes=notes)
        if found.flops is not None:
            profile.header.flops_per_step, profile.header.hardware_flops_per_step = found.flops
        if profile.header.peak_flops is None and found.peak[0] is not None:
            profile.header.peak_flops, profile.header.peak_source = found.peak
        profile.ceilings, profile.kernels, profile.syncs = found.ceilings, found.kernels, found.syncs
        profile.memory, profile.window_steps = found.memory, found.counted
        profile.device_window = found.device_window
        profile.timeline = [*found.timeline, *profile.timeline]
        return profile


class _Found:
    """What the look has found so far; each field is replaced as a whole, since another thread writes files of it."""

    def __init__(self) -> None:
        self.ceilings = Ceilings()
        self.peak: tuple[float | None, str | None] = (None, None)
        self.flops: tuple[float, float] | None = None  # of a batch: the model's, and the hardware's
        self.kernels: list[Kernel] = []
        self.device_window: DeviceWindow | None = None
        self.syncs: list[Sync] = []
        self.counted: int | None = None  # batches that host reads were looked for in
        self.memory = Memory()
        self.timeline: list[Span] = []
        self.notes: list[str] = []


class _Look:
    """Which step comes, and what is done with it. A step is one window of accumulated micro-batches."""

    def __init__(self, profiler: DeepProfiler, trainer: Trainer, found: _Found) -> None:
        self.profiler, self.trainer, self.found = profiler, trainer, found
        self.device = trainer.config.device
        self.steps = 0  # that have ended
        self.first = profiler.skip  # the step that memory is sampled in; the next is counted; then comes the window
        self.wanted = self.first + 2 + profiler.window
        self.batches = 0  # of the step that goes on
        self.compiled = self.given_up = False
        self.compiled_steps: dict[str, list[list[Pass]]] = {}  # by an optimizer's class
        self.memory: StepMemory | None = None
        self.costs, self.syncs = Costs(), Syncs(self.device)
        self.tracing: _Tracing | None = None
        self.usual: list[float] = []  # s of steps before and in the window, to tell what looking costs
        self.traced: list[float] = []
        self.spent = 0.0

    def run(self, run: Run, plan: StepPlan, batch: Any, batch_idx: int, last: bool) -> None:
        begin = time.perf_counter()
        if self.steps < self.first or (self.compiled and self.steps <= self.first + 1):
            run(plan, batch, batch_idx)
        elif self.steps == self.first:
            self._in_memory(run, plan, batch, batch_idx, last)
        elif self.steps == self.first + 1:
            with self.costs, self.syncs:
                run(plan, batch, batch_idx)
        else:
            assert self.tracing is not None
            self.tracing.run(run, _with_ranges(plan, self.device), batch, batch_idx, last)
        self.spent += time.perf_counter() - begin
        self.batches += 1
        if last and not self.given_up:
            with self._apart():
                self._after_step()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """What goes wrong in looking is told, and ends the look; the run goes on."""
        try:
            yield
        except Exception as error:
            self.given_up, self.memory = True, None
            said = f"the closer look was given up after {self.steps} steps: {type(error).__name__}: {error}"
            self.found.notes = [*self.found.notes, said]
            warnings.warn(f"DeepProfiler: {said}.", RuntimeWarning, stacklevel=3)
            self.profiler.resume()
            self.profiler.over()

    def _after_step(self) -> None:
        done, self.steps = self.steps, self.steps + 1
        if done < self.first:
            self.usual.append(self.spent)
        elif done == self.first:
            self._say_memory()
        elif done == self.first + 1:
            if not self.compiled:
                self._say_costs()
            if self.device.type == "cuda":  # between two steps: what they have queued is not the window's
                torch.cuda.synchronize(self.device)
            self.tracing = _Tracing.begin(self.device, self.profiler._clock, self.batches, self.found)
        else:
            self.traced.append(self.spent)
        self.spent, self.batches = 0.0, 0
        if self.steps == self.first:
            self.profiler.pause("profiling")
            self.compiled = _has_compiled(self.trainer.lightning_module)
            if self.compiled:
                self.found.notes = [*self.found.notes, _COMPILED]
        elif self.steps == self.wanted or (self.steps == self.first + 2 and self.tracing is None):
            self._end()

    def _in_memory(self, run: Run, plan: StepPlan, batch: Any, batch_idx: int, last: bool) -> None:
        if self.memory is None:
            with self._apart():
                self.memory = StepMemory(self.trainer.lightning_module, self.trainer.optimizers, self.device)
                self.memory.sample("start")
        memory = self.memory
        if memory is None:
            run(plan, batch, batch_idx)
            return

        def sampled(function: Callable[..., Any], point: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                result = function(*args)
                self._sample(point)
                return result

            return call

        seen = replace(
            plan,
            training_step=sampled(plan.training_step, "forward"),
            backward=sampled(plan.backward, "backward"),
        )
        with memory:
            run(seen, batch, batch_idx)
        if last:
            self._sample("optimizer")

    def _sample(self, point: str) -> None:
        if self.memory is not None:
            with self._apart():
                self.memory.sample(point)

    def _say_memory(self) -> None:
        if self.memory is not None:
            self.found.memory, self.memory = self.memory.memory(), None

    def _say_costs(self) -> None:
        found, costs = self.found, self.costs
        found.syncs, found.counted = self.syncs.found(), self.batches
        found.flops = (costs.model_flops / self.batches, costs.hardware_flops / self.batches)
        if costs.uncounted:
            name, why = next(iter(costs.uncounted.items()))
            said = f"{len(costs.uncounted)} operations could not be counted, the first is {name}: {why}"
            found.notes = [*found.notes, said]
        dtype = compute_dtype(str(self.trainer.precision))
        found.peak = peak_of(self.device, dtype, found.ceilings)
        plans = self.trainer.fit_loop.plans
        by_norm = bool(self.trainer.gradient_clip_val) and self.trainer.gradient_clip_algorithm != "value"
        for adopted in plans.binding.stepping.adopted if plans is not None else ():
            if adopted.compiled:  # the core's steps pass by torch's dispatcher
                made = self.compiled_steps.setdefault(type(adopted.optimizer).__name__, [])
                made.append(passes_of(adopted, clips_by_norm=by_norm and not adopted.reads_gradients_first))

    def _end(self) -> None:
        if self.tracing is not None:
            tracing, self.tracing = self.tracing, None
            tracing.end(self.costs, self.compiled_steps, self.found)
            if self.usual and self.traced:
                usual, traced = statistics.median(self.usual), statistics.median(self.traced)
                said = (
                    f"a step under torch.profiler took {traced * 1e3:.3f} ms, one before {usual * 1e3:.3f} ms (medians)"
                )
                self.found.notes = [*self.found.notes, said]
        self.profiler.resume()
        self.profiler.over()

    def cut_short(self) -> None:
        """The run ends before the look does."""
        if self.given_up:
            return
        self.found.notes = [
            *self.found.notes,
            f"the run ended after {self.steps} steps, before all of them could be looked at: that takes {self.wanted}; "
            f"DeepProfiler(skip={self.first}, window={self.profiler.window}) says how many",
        ]
        with self._apart():
            self._end()


class _Tracing:
    """A window of steps under torch.profiler, each in a range of its own."""

    def __init__(self, profiler: Any, batches: int, since: Callable[[int], float], teardown: str | None) -> None:
        self.profiler, self.batches, self.since, self.teardown = profiler, batches, since, teardown
        self.mark: Any = None

    @classmethod
    def begin(cls, device: torch.device, clock: PhaseClock, batches: int, found: _Found) -> _Tracing | None:
        """None, and a note, where another profiler is at work.

        Args:
            batches: of each step.
        """
        from torch.profiler import ProfilerActivity, profile

        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            found.notes = [*found.notes, "no kernels: another torch.profiler is at work, and there can be one"]
            return None
        teardown = os.environ.get(TEARDOWN)
        if device.type == "cuda":
            os.environ.setdefault(TEARDOWN, "1")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        profiler = profile(activities=activities)
        # Kineto's times are of the system's clock, the run's of the steady one: both are read now.
        at_run, at_system = clock.read().wall, time.time_ns()
        profiler.start()
        return cls(profiler, batches, lambda nanoseconds: (nanoseconds - at_system + at_run) * 1e-9, teardown)

    def run(self, run: Run, plan: StepPlan, batch: Any, batch_idx: int, last: bool) -> None:
        if self.mark is None:
            self.mark = record_function(STEP)
            self.mark.__enter__()
        try:
            run(plan, batch, batch_idx)
        except BaseException:
            self._end_step()
            raise
        if last:
            self._end_step()

    def _end_step(self) -> None:
        self.mark.__exit__(None, None, None)
        self.mark = None

    def end(self, costs: Costs, compiled: dict[str, list[list[Pass]]], found: _Found) -> None:
        if self.mark is not None:
            self._end_step()
        self.profiler.stop()
        if self.teardown is None:
            os.environ.pop(TEARDOWN, None)
        window = Window(events_of(self.profiler), costs.calls, self.batches, compiled)
        if window.steps:
            found.kernels, found.device_window = window.kernels(found.ceilings), window.on_device()
            found.timeline = [*window.ranges(RANGE, self.since), *window.spans(self.since)]


_COMPILED = (
    "something is compiled by torch.compile, which would run eagerly from here on if its operations were looked at: no "
    "memory, FLOPs, bytes, nor host reads"
)


def _has_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile has made anything that runs in this process."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    if counters.get("stats", {}).get("unique_graphs", 0):
        return True
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules())


def _with_ranges(plan: StepPlan, device: torch.device) -> StepPlan:
    """The same plan, each of its points in a range that torch.profiler, and on CUDA Nsight, shows by its phase."""
    ranged: dict[str, Any] = {}
    for field in fields(plan):
        phase = _PHASES.get(field.name)
        if phase is None:
            continue
        bound = getattr(plan, field.name)
        if isinstance(bound, tuple):
            ranged[field.name] = tuple(_in_range(phase, function, device) for function in bound)
        else:
            ranged[field.name] = _in_range(phase, bound, device)
    return replace(plan, **ranged)


def _in_range(phase: str, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    name = RANGE + phase
    if device.type != "cuda":

        def recorded(*args: Any) -> Any:
            with record_function(name):
                return function(*args)

        return recorded

    def marked(*args: Any) -> Any:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            with record_function(name):
                return function(*args)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    return marked
