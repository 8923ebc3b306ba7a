"""A closer look at some steps: what it finds in a run, that it changes nothing, and that nothing of it stays behind."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from heart_models import QUIET, Plain, batches, fitted
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lit_fast
from lit_fast import step
from lit_fast.errors import MisconfigurationException
from lit_fast.profiler import DeepProfiler, StepProfiler, files, record
from lit_fast.profiler import ceilings as ceilings_room
from lit_fast.profiler.deep import TEARDOWN, _in_range, _Tracing, _with_ranges


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of test_ceilings.py, where they are measured."""
    known = record.Ceilings(10e9, {"float32": 100e9}, "known")
    monkeypatch.setattr(ceilings_room, "_measured", lambda *_: known)


class Reads(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if loss.item() > 1e9:  # a hidden read
            raise ValueError
        return loss


class ReadsInAHook(lit_fast.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        float(outputs["loss"])  # in a hook


def line_of(owner: Any, text: str) -> int:
    lines, first = inspect.getsourcelines(owner)
    return first + next(n for n, line in enumerate(lines) if text in line)


def deep(model: Any, count: int = 12, window: int = 3, **options: Any) -> tuple[Any, record.Profile]:
    profiler = DeepProfiler(skip=2, window=window)
    made = fitted(model, batches(count), max_epochs=1, profiler=profiler, **options)
    return made, profiler.profile()


def test_a_profile_of_a_fit() -> None:
    model = Plain(lambda p: torch.optim.AdamW(p, lr=0.01))
    _, found = deep(model)
    parameters = sum(p.numel() for p in model.parameters())
    rows = {kernel.name: kernel for kernel in found.kernels}
    assert found.header.mode == "deep" and found.header.peak_source is not None
    assert found.header.peak_flops == 100e9
    assert found.header.flops_per_step == found.header.hardware_flops_per_step
    assert rows["lit_fast AdamW step"].bytes == 3 * 28 * parameters and rows["lit_fast AdamW step"].calls == 3
    assert rows["lit_fast AdamW step"].bound == "memory" and rows["lit_fast AdamW step"].steps == 3
    assert rows["lit_fast AdamW step"].flops == 3 * 15 * parameters
    products = [rows[name].flops for name in ("aten::addmm", "aten::mm") if name in rows]
    assert sum(filter(None, products)) == 3 * found.header.flops_per_step
    points = {sample.point: sample for sample in found.memory.over_step}
    assert list(points) == ["start", "forward", "backward", "optimizer"]
    assert all(sample.parameters == 4 * parameters for sample in points.values())
    assert points["backward"].gradients == 4 * parameters and points["forward"].activations > 0
    assert points["optimizer"].optimizer >= 8 * parameters and points["backward"].activations == 0
    assert [sync.line for sync in found.syncs] == ["self.losses.append(loss.item())"]
    assert found.devices[0].name == "CPU" and found.ceilings.how == "known"
    assert any("under torch.profiler took" in note for note in found.header.notes)


def test_the_looked_at_steps_are_a_row_of_their_own() -> None:
    _, found = deep(Plain())
    assert found.steps.count == 12 - 1 - 1 - 3  # for memory, for counting, the window
    assert found.phase("profiling") > 0
    assert sum(phase.seconds for phase in found.phases) == pytest.approx(found.wall, rel=1e-9)
    window = [span for span in found.timeline if span.step is None and span.track == "phases"]
    assert [span.name for span in window].count("forward") == 3
    kernels = [span for span in found.timeline if span.track == "kernels"]
    assert kernels and all(0 < span.begin < found.wall and span.seconds < found.wall for span in kernels)
    assert window[0].begin < kernels[0].begin < window[-1].begin + window[-1].seconds


def test_hidden_reads_are_named_with_their_line() -> None:
    _, found = deep(Reads(), callbacks=[ReadsInAHook()])
    lines = {sync.line: sync for sync in found.syncs}
    here = Path(__file__).name
    planted = {"if loss.item() > 1e9:  # a hidden read", 'float(outputs["loss"])  # in a hook'}
    assert set(lines) == {*planted, "self.losses.append(loss.item())"}  # which Plain itself does
    for owner, text in ((Reads, "# a hidden read"), (ReadsInAHook, "# in a hook")):
        (sync,) = (sync for line, sync in lines.items() if text in line)
        assert sync.where.endswith(f"{here}:{line_of(owner, text)}") and sync.calls == 1


class Validates(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_are_the_same_with_and_without(accumulate: int) -> None:
    results = []
    for profiler in (None, DeepProfiler(skip=1, window=2)):
        torch.manual_seed(1)
        model = Validates(lambda p: torch.optim.AdamW(p, lr=0.01))
        options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
        fitted(model, batches(13), [batches(2)], max_epochs=2, val_check_interval=3, profiler=profiler, **options)
        results.append([*model.losses, *(p.detach().clone() for p in model.parameters())])
    for with_it, without in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(with_it), torch.as_tensor(without))


def test_afterwards_the_plans_run_what_they_would_have_run() -> None:
    made, _ = deep(Plain())
    plans = made.fit_loop.plans
    assert plans.kind(True, True, 1).run.__wrapped__ is step.inline
    assert plans.binding.place(next(iter(plans.binding.placed))).run.__wrapped__ is step.inline
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    assert StepProfiler().bind_run(step.inline, True) is step.inline


def test_afterwards_nothing_of_it_is_at_work() -> None:
    def at_work() -> tuple[Any, ...]:
        return (
            list(gc.callbacks),
            list(sys.meta_path),
            sys.gettrace(),
            sys.getprofile(),
            sorted(thread.name for thread in threading.enumerate()),
            os.environ.get(TEARDOWN),
            torch.autograd._profiler_enabled(),  # type: ignore[attr-defined]
            torch._C._autograd._top_saved_tensors_default_hooks(True),
            _get_current_dispatch_mode_stack(),
            _get_current_function_mode_stack(),
        )

    fitted(Plain(), batches(2), max_epochs=1)
    before = at_work()
    _, found = deep(Plain())
    assert found.kernels and at_work() == before


def test_figures_are_of_a_batch_where_gradients_accumulate() -> None:
    single = deep(Plain(), count=20)[1]
    _, found = deep(Plain(), count=20, accumulate_grad_batches=2)
    assert found.header.flops_per_step == single.header.flops_per_step
    of_one = {kernel.name: kernel for kernel in single.kernels}
    for name in ("aten::mm", "aten::addmm"):
        row = next((kernel for kernel in found.kernels if kernel.name == name), None)
        if row is not None:
            assert row.steps == 6 and row.flops == 2 * of_one[name].flops
    assert found.steps.count == 20 - 2 - 2 - 6 and found.window_steps == 2
    assert sum(sync.calls for sync in found.syncs) == 2  # Plain reads its loss in every batch


def test_a_run_that_ends_early_says_so_and_leaves_no_profiler_on() -> None:
    for count in (1, 3, 4, 5):
        _, found = deep(Plain(), count=count)
        assert any(f"the run ended after {count} steps" in note for note in found.header.notes)
        assert sum(phase.seconds for phase in found.phases) == pytest.approx(found.wall, rel=1e-9)
    assert [kernel.steps for kernel in found.kernels[:1]] == [1]  # of the one step that was in the window
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


class Breaks(Plain):
    at = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.at:
            raise KeyError("broken")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_an_error_in_any_of_the_steps_ends_it_orderly(at: int, tmp_path: Path) -> None:
    model = Breaks()
    model.at = at
    profiler = DeepProfiler(tmp_path, skip=2, window=3)
    with pytest.raises(KeyError, match="broken"):
        fitted(model, batches(9), max_epochs=1, profiler=profiler)
    found = files.read(tmp_path / "rank-00000.json")
    assert isinstance(found, record.Profile) and found.ended_by == "KeyError"
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    fitted(Plain(), batches(9), max_epochs=1, profiler=profiler)  # the same profiler again
    assert profiler.profile().kernels and profiler.profile().ended_by is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a file that is read while the window's events are lost
@pytest.mark.parametrize(
    ("room", "name"),
    [
        ("deep", "measure_ceilings"),
        ("sensors", "Sensors.start"),
        ("memory", "StepMemory.sample"),
        ("memory", "StepMemory.memory"),
        ("deep", "peak_of"),
        ("deep", "_Tracing.begin"),
        ("deep", "events_of"),
    ],
)
@pytest.mark.parametrize("count", [12, 3])  # to the window's end, and not
def test_what_fails_in_looking_is_told_and_the_run_goes_on(
    room: str, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no luck")

    usual, *_ = run_of(count)
    monkeypatch.setattr(f"lit_fast.profiler.{room}.{name}", broken)
    losses, found, warned = run_of(count)
    assert losses == usual and found.finished and len(found.timeline) > 0
    reached = count == 12 or (room, name) not in {
        ("deep", "peak_of"),
        ("deep", "_Tracing.begin"),
        ("deep", "events_of"),
    }
    assert reached == any("no luck" in text for text in warned)
    assert sum(row.seconds for row in found.phases) == pytest.approx(found.wall, rel=1e-12)
    assert found.steps.count >= count - 6 and not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def run_of(count: int) -> tuple[list[Any], record.Profile, list[str]]:
    torch.manual_seed(1)
    model = Plain()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, found = deep(model, count)
    return [float(loss) for loss in model.losses], found, [str(each.message) for each in told]


def test_another_profiler_at_work_is_a_note() -> None:
    with profile(activities=[ProfilerActivity.CPU]):
        _, found = deep(Plain())
    assert found.kernels == [] and any("another torch.profiler" in note for note in found.header.notes)
    assert found.memory.over_step and found.header.flops_per_step


def test_by_name_and_wrong_numbers() -> None:
    assert type(lit_fast.Trainer(**QUIET, profiler="deep").profiler) is DeepProfiler
    for wrong in ({"skip": 0}, {"window": 0}, {"sensors_every": 0.0}):
        with pytest.raises(MisconfigurationException, match=f"DeepProfiler\\({next(iter(wrong))}="):
            DeepProfiler(**wrong)


def test_manual_optimization_is_looked_at_too() -> None:
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.01))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    _, found = deep(Manual())
    assert found.header.flops_per_step and "lit_fast SGD step" in {kernel.name for kernel in found.kernels}


class FakeProfile:
    """torch.profiler as far as a window needs it, with CUPTI's part left out: there is no GPU here."""

    def __init__(self, activities: list[Any]) -> None:
        self.activities = activities
        FakeProfile.last = self

    def start(self) -> None:
        self.teardown = os.environ.get(TEARDOWN)

    def stop(self) -> None: ...

    class profiler:
        class kineto_results:
            @staticmethod
            def events() -> list[Any]:
                return []


def test_on_cuda_cupti_is_told_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.delenv(TEARDOWN, raising=False)
    profiler = DeepProfiler()
    tracing = _Tracing.begin(torch.device("cuda"), profiler._clock, 1, profiler._found)
    assert tracing is not None and ProfilerActivity.CUDA in FakeProfile.last.activities
    assert FakeProfile.last.teardown == "1"
    tracing.end(lit_fast.profiler.costs.Costs(), {}, profiler._found)
    assert TEARDOWN not in os.environ and profiler._found.kernels == []


def test_on_cuda_points_of_the_step_are_nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    nvtx = ModuleType("nvtx")
    nvtx.range_push, nvtx.range_pop = calls.append, lambda: calls.append("pop")  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    marked = _in_range("forward", lambda: calls.append("inside"), torch.device("cuda"))
    marked()
    assert calls == ["lit_fast forward", "inside", "pop"]


def test_every_point_of_a_plan_is_in_a_range() -> None:
    made, _ = deep(Plain())
    plan = made.fit_loop.plans.kind(True, True, 1)
    ranged = _with_ranges(plan, torch.device("cpu"))
    assert ranged.training_step is not plan.training_step and ranged.log is plan.log
    assert len(ranged.update) == len(plan.update) and ranged.run is plan.run


def test_what_is_compiled_stays_compiled() -> None:
    class Compiled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.graphs = self.runs = 0
            self.net = torch.compile(self.net, backend=self.backend)

        def backend(self, graph: Any, inputs: Any) -> Any:
            self.graphs += 1

            def run(*args: Any) -> Any:
                self.runs += 1
                return graph.forward(*args)

            return run

    try:
        model = Compiled()
        _, found = deep(model)
    finally:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    assert (model.graphs, model.runs) == (1, 12)
    assert any("compiled by torch.compile" in note for note in found.header.notes)
    assert found.kernels and found.memory.over_step == [] and found.header.flops_per_step is None


@pytest.mark.gpu
def test_a_profile_of_a_fit_on_a_gpu() -> None:
    class OnGPU(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    model = OnGPU(lambda p: torch.optim.AdamW(p, lr=0.01))
    _, found = deep(model, count=20, accelerator="gpu", gradient_clip_val=1.0)
    ours = {kernel.name: kernel for kernel in found.kernels if kernel.name.startswith("lit_fast ")}
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(kernel.bytes or 0.0 for kernel in ours.values()) == 3 * (28 + 4) * parameters, sorted(ours)
    assert found.device_window is not None and found.device_window.steps == 3
    assert 0.0 < found.device_window.compute < found.device_window.seconds
    assert found.device_steps.count
    if importlib.util.find_spec("pynvml") is not None:
        assert {"sm clock", "power"} <= {reading.name for reading in found.devices[0].readings}, found.header.notes
    assert not found.syncs, found.syncs
    assert TEARDOWN not in os.environ
