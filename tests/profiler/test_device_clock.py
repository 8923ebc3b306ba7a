"""The device's own time by phase, on a device whose clock the tests move; on a GPU where there is one."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from heart_models import Plain, batches, fitted

import lit_fast
from lit_fast.profiler import device_clock, record
from lit_fast.profiler.compare import Alternation
from lit_fast.profiler.device_clock import EVENTS, IDLE, SHARE, DeviceClock
from lit_fast.profiler.merge import of_profiles
from lit_fast.profiler.report import facts
from lit_fast.profiler.report.terminal import print_report
from lit_fast.profiler.step import StepProfiler
from lit_fast.profiler.windows import FirstSteps

US, MS = 1_000, 1_000_000  # ns
GPU = torch.device("cuda", 0)
ALL = 1e9  # a share that marks never take, though steps of a device that is none take no time: all are measured


class Run:
    """Steps as the loop runs them on a GPU: a batch is fetched, then forward, backward and optimizer launch kernels."""

    def __init__(self, kernel: int, launch: int = 10 * US, loader: int = 100 * US, share: float = ALL) -> None:
        self.cuda = FakeCuda()
        self.clock = DeviceClock(GPU, self.cuda, share)
        self.kernel, self.launching, self.loader = kernel, launch, loader
        self.forward = self.clock.wrap("forward", lambda: self.launch(2))
        self.backward = self.clock.wrap("backward", lambda: self.launch(4))
        self.optimizer = self.clock.wrap("optimizer", lambda: self.launch(1))
        self.schedulers = self.clock.wrap("schedulers", lambda: self.cuda.host(7 * US))
        self.step = self.clock.wrap("loop", self.one_step)
        self.in_step: Callable[[], None] = lambda: None

    def launch(self, kernels: int) -> None:
        for _ in range(kernels):
            self.cuda.host(self.launching)
            self.cuda.launch(self.kernel)

    def read_batches(self, count: int) -> Iterator[int]:
        for index in range(count):
            self.cuda.host(self.loader)
            yield index

    def to_device(self, read: Iterator[int]) -> Iterator[int]:
        for index in read:
            self.cuda.host(5 * US)
            yield index

    def one_step(self) -> None:
        waited = self.cuda.waited
        self.cuda.host(3 * US)
        self.forward()
        self.in_step()
        self.backward()
        self.optimizer()
        self.schedulers()
        assert self.cuda.waited == waited

    def run(self, steps: int) -> device_clock.DeviceTimes:
        read = self.clock.items("data", self.read_batches(steps))
        for _ in self.clock.steps("transfer", self.to_device(read)):
            self.step()
        self.clock.finish()
        return self.clock.read()

    def a_step(self, found: device_clock.DeviceTimes) -> dict[str, float]:
        """us by phase"""
        return {name: round(1e6 * spread.total / found.steps.count, 6) for name, spread in found.phases.items()}


def test_a_host_that_is_slower_leaves_the_device_idle() -> None:
    run = Run(kernel=2 * US)  # 10 us to launch, 2 us to run
    found = run.run(20)
    assert found.steps.count == found.ended == 20
    # The host launches n kernels in n * 10 us; the last of them ends 2 us later, while it launches backward's first.
    # Idle: it reads data, does what comes before forward (3 us), and schedulers, less 2 us that the last kernel takes.
    assert run.a_step(found) == {
        "transfer": 5.0,
        "idle": 100.0 + 3.0 + 7.0 - 2.0,
        "forward": 20.0 + 2.0,
        "backward": 40.0,
        "optimizer": 10.0,
    }


def test_a_device_that_is_slower_is_never_idle() -> None:
    run = Run(kernel=1 * MS)
    found = run.run(20)
    # From the second step on. The first finds a device with nothing to do, until its first kernel is launched.
    idle = 100.0 + 3.0
    assert found.phases["idle"].maximum == pytest.approx(idle * 1e-6)
    assert found.phases["idle"].total == pytest.approx(idle * 1e-6)
    assert found.phases["forward"].minimum == pytest.approx(2e-3) and found.phases["forward"].maximum < 2.02e-3
    assert found.phases["backward"].mean == pytest.approx(4e-3)
    assert found.phases["optimizer"].mean == pytest.approx(1e-3)


def test_phases_add_up_to_the_step() -> None:
    for kernel in (US, 30 * US, MS):
        found = Run(kernel).run(40)
        assert sum(spread.total for spread in found.phases.values()) == pytest.approx(found.steps.total, rel=1e-12)
        assert found.steps.count == 40


def test_a_step_has_eleven_events_and_waits_for_none() -> None:
    run = Run(kernel=MS)
    run.run(0)
    before, waited = run.cuda.recorded, run.cuda.waited
    run.run(10)
    assert run.cuda.recorded - before == 10 * 11 + 3  # and those of the fetch that found the end
    assert run.cuda.waited == waited + 1  # at the end of the run


def test_time_belongs_to_the_innermost_phase() -> None:
    """The closure shape: the optimizer calls forward and backward. Communication is waited for inside backward."""
    cuda = FakeCuda()
    clock = DeviceClock(GPU, cuda, ALL)

    def work(nanoseconds: int) -> None:
        cuda.host(US)
        cuda.launch(nanoseconds)

    forward = clock.wrap("forward", lambda: work(100 * US))
    wait = clock.wrap("communication", lambda: work(30 * US))

    def engine() -> None:
        work(200 * US)
        wait()
        work(50 * US)

    backward = clock.wrap("backward", engine)

    def optimizer_step() -> None:
        forward()
        backward()
        work(70 * US)

    step = clock.wrap("loop", clock.wrap("optimizer", optimizer_step))
    for _ in clock.steps("transfer", iter(range(5))):
        cuda.launch(10 * US)  # the device has something to do meanwhile
        step()
    clock.finish()
    found = clock.read()
    means = {name: spread.mean * 1e6 for name, spread in found.phases.items() if name in ("communication", "backward")}
    assert means == pytest.approx({"communication": 30.0, "backward": 250.0})
    assert found.phases["forward"].minimum == pytest.approx(100e-6)
    assert found.phases["optimizer"].minimum == pytest.approx(70e-6)


def test_a_phase_within_itself_takes_no_events() -> None:
    cuda = FakeCuda()
    clock = DeviceClock(GPU, cuda, ALL)
    inner = clock.wrap("hooks", lambda: cuda.host(US))
    step = clock.wrap("loop", clock.wrap("hooks", lambda: (inner(), inner())))
    next(clock.steps("data", iter(range(1))))
    before = cuda.recorded
    step()
    assert cuda.recorded - before == 2 + 1


def test_outside_of_steps_nothing_is_marked() -> None:
    run = Run(kernel=US)
    run.forward()
    assert run.cuda.recorded == 0
    run.clock.paused = True
    next(run.clock.steps("transfer", iter(range(1))))
    before = run.cuda.recorded
    run.step()
    assert run.cuda.recorded == before and run.clock.read().ended == 0
    run.clock.paused = False
    assert run.run(3).steps.count == 3


def test_a_device_far_behind_costs_measurements_and_no_memory() -> None:
    run = Run(kernel=100 * MS, loader=0)  # 0.7 s a step of which the host needs 80 us
    found = run.run(200)
    fit = EVENTS // 11
    assert run.cuda.made == EVENTS and found.ended == 200
    assert found.steps.count == fit
    assert len(found.notes) == 1 and found.notes[0].startswith(f"{200 - fit} of 200 steps are not in the device's own")
    run.kernel = US
    assert run.run(10).steps.count == fit + 10 and run.cuda.made == EVENTS


def test_what_it_keeps_does_not_grow_with_steps() -> None:
    run = Run(kernel=5 * US)
    found = run.run(3000)
    assert found.steps.count == 3000 and run.cuda.made <= 2 * 16
    assert all(len(spread.buckets) == 1 for spread in found.phases.values())
    assert not run.clock._passed


def test_a_step_that_an_exception_goes_through_is_left_out() -> None:
    run = Run(kernel=US)

    def broken() -> None:
        raise KeyError

    run.in_step = broken
    with pytest.raises(KeyError):
        run.run(1)
    run.in_step = lambda: None
    found = run.run(4)
    assert found.steps.count == 4 and run.a_step(found)["forward"] == 21.0


def test_marks_take_their_share_of_a_step_at_most() -> None:
    run = Run(kernel=US, share=SHARE)  # some 200 us a step
    run.run(0)
    run.clock._price = 1e-6  # so 11 us: 5.5 %
    found = run.run(4000)
    assert 0.5 < found.cost / (SHARE * found.steps.mean) < 1.2
    assert found.steps.count < 1000 and "drawn at random" in found.notes[0]
    assert f"{4000 - found.steps.count} of 4000 steps" in found.notes[0]
    assert run.a_step(found)["backward"] == 40.0  # what is measured is as right


def test_a_device_that_fails_is_a_note() -> None:
    run = Run(kernel=US)

    def fails() -> None:
        run.cuda.error = "CUDA error: device-side assert triggered\nCompile with ..."

    run.run(3)
    run.in_step = fails
    found = run.run(5)
    assert found.steps.count == 3 == found.ended
    assert found.notes == [
        "the device's own time was measured until it failed: CUDA error: device-side assert triggered"
    ]


# -- in the profiler


def test_on_the_cpu_nothing_is_added() -> None:
    assert device_clock.of(torch.device("cpu"), None) is None
    made = fitted(Plain(), batches(3), max_epochs=1, profiler="step")
    assert made.profiler._on_device is None
    plan = made.fit_loop.plans.kind(True, True, 1)
    assert plan.run.__wrapped__ is lit_fast.step.inline
    assert plan.training_step.__wrapped__ == made.lightning_module.training_step
    profile = made.profiler.profile()
    assert not profile.device_steps.count and not any(row.on_device.count for row in profile.phases)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Every run has a device beside it."""
    cuda = FakeCuda()
    monkeypatch.setattr(device_clock, "of", lambda device, before: DeviceClock(GPU, cuda, ALL))
    return cuda


class Launches(Plain):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.cuda.host(10 * US)
        self.cuda.launch(300 * US)
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.cuda.host(MS)  # while the device has nothing to do


def test_a_fit_has_the_devices_column(cuda: FakeCuda) -> None:
    made = fitted(Launches(cuda), batches(6), max_epochs=2, profiler="step", accumulate_grad_batches=2)
    profile = made.profiler.profile()
    rows = {row.name: row for row in profile.phases}
    assert profile.device_steps.count == 12 == profile.steps.count
    assert rows["forward"].on_device.mean == pytest.approx(310e-6) and rows["forward"].on_device.count == 12
    assert rows["optimizer"].on_device.count == 12  # a window's first batch releases gradients, its last one steps
    # Where a batch is fetched, and the step's end; forward, backward, optimizer and a hook, where they begin and end.
    assert cuda.recorded == 12 * (1 + 1 + 4 * 2) + 4 * 16  # the latter to learn what marks take
    assert rows["hooks"].on_device.mean == pytest.approx(0.7e-3)  # of 1 ms: the device is with forward for 0.3
    assert rows["idle"].seconds == 0.0
    assert abs(sum(row.seconds for row in profile.phases) - profile.wall) < 1e-9
    on_device = sum(row.on_device.total for row in profile.phases)
    assert on_device == pytest.approx(profile.device_steps.total, rel=1e-12)
    assert profile.own_cost is not None and profile.own_cost > 0


def test_reports_have_a_column_for_it(cuda: FakeCuda) -> None:
    from lit_fast.profiler.report.sections import _phase_table  # needs bokeh, which a GPU machine may lack

    profile = fitted(Launches(cuda), batches(6), max_epochs=1, profiler=StepProfiler(show=False)).profiler.profile()
    report = of_profiles([profile])
    figure = {"ms": "0.31", "us": "310"}[facts.unit(report)[1]]
    text = io.StringIO()
    print_report(report, text)
    lines = text.getvalue().splitlines()
    head = next(line for line in lines if line.startswith("phase"))
    assert head.endswith("GPU") and max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("forward")).endswith(f" {figure}")
    assert next(line for line in lines if line.startswith("idle")).split()[:2] == ["idle", "0.0"]
    assert "<th>GPU " in _phase_table(report) and f"<td>{figure}</td></tr>" in _phase_table(report)
    profile.device_steps = record.Distribution()
    assert "GPU" not in _phase_table(of_profiles([profile]))


def test_a_comparison_leaves_it_out(cuda: FakeCuda) -> None:
    assert StepProfiler.marks_device and FirstSteps.marks_device and not Alternation.marks_device
    quiet = StepProfiler(show=False)
    quiet.marks_device = False
    fitted(Launches(cuda), batches(3), max_epochs=1, profiler=quiet)
    assert cuda.recorded == 0


def test_losses_are_the_same(cuda: FakeCuda) -> None:
    losses = []
    for profiler in (None, "step"):
        model = Plain()
        fitted(model, batches(8), max_epochs=2, profiler=profiler, gradient_clip_val=0.5)
        losses.append(model.losses)
    assert losses[0] == losses[1]


# -- on a GPU


def cycles_of(seconds: float) -> int:
    """For `torch.cuda._sleep`, by two events around one."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    return int(100_000_000 * seconds / (begin.elapsed_time(end) * 1e-3))


@pytest.mark.gpu
def test_times_of_a_gpu_are_those_of_an_independent_clock() -> None:
    cycles = cycles_of(0.004)
    clock = DeviceClock(GPU)
    forward = clock.wrap("forward", lambda: torch.cuda._sleep(cycles))
    step = clock.wrap("loop", forward)
    iterator = clock.steps("transfer", iter(range(30)))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in iterator:
        step()
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    clock.finish()
    found = clock.read()
    assert found.steps.count == 30 and not found.notes
    assert found.phases["forward"].total == pytest.approx(took, rel=0.02)
    assert found.phases[IDLE].total < 0.02 * took


@pytest.mark.gpu
def test_a_gpu_that_waits_for_its_host_is_idle() -> None:
    cycles = cycles_of(0.001)
    clock = DeviceClock(GPU)
    forward = clock.wrap("forward", lambda: torch.cuda._sleep(cycles))

    def slow() -> None:
        forward()
        time.sleep(0.005)

    step = clock.wrap("loop", slow)
    for _ in clock.steps("transfer", iter(range(20))):
        step()
    clock.finish()
    found = clock.read()
    assert found.phases[IDLE].mean == pytest.approx(0.004, rel=0.1)  # it begins to wait 1 ms after the host does
    assert found.phases["forward"].mean == pytest.approx(0.001, rel=0.05)


class OnGPU(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


@pytest.mark.gpu
def test_a_fit_on_a_gpu_is_measured_and_never_synchronised() -> None:
    profiler = StepProfiler(show=False)

    class NoSyncs(lit_fast.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_train_end(self, trainer: Any, module: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        fitted(OnGPU(), batches(40), max_epochs=1, accelerator="gpu", profiler=profiler, callbacks=[NoSyncs()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    profile = profiler.profile()
    rows = {row.name: row for row in profile.phases}
    assert profile.device_steps.count and profiler._on_device is not None
    assert profiler._on_device._marks == 15 * profile.device_steps.count  # device_clock.EVENTS says so
    assert {"forward", "backward", "optimizer", "idle"} <= set(rows)
    assert all(rows[name].on_device.count for name in ("forward", "backward", "optimizer", "idle"))
    on_device = sum(row.on_device.total for row in profile.phases)
    assert on_device == pytest.approx(profile.device_steps.total, rel=1e-9)


@pytest.mark.gpu
def test_marks_take_a_hundredth_of_a_step_of_5_ms() -> None:
    cycles = cycles_of(0.005 / 3)
    clock = DeviceClock(GPU)
    phases = [clock.wrap(name, lambda: torch.cuda._sleep(cycles)) for name in ("forward", "backward", "optimizer")]

    def one() -> None:
        for phase in phases:
            phase()

    step = clock.wrap("loop", one)
    for _ in clock.steps("transfer", clock.items("data", iter(range(200)))):
        step()
    clock.finish()
    found = clock.read()
    assert found.cost <= 0.01 * found.steps.mean
    assert found.steps.count == 200, f"{found.notes}: marks are dearer than 1 % of 5 ms"
