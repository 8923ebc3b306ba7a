"""Kernels of a window: the CPU's against torch.profiler's own table; a GPU's on events as CUPTI gives them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from lit_fast.profiler.costs import Cost, Costs
from lit_fast.profiler.kernels import STEP, Event, Window, events_of, nest
from lit_fast.profiler.record import Ceilings, Kernel

STEPS = 4


def test_times_are_those_of_torch_and_bytes_are_counted() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 64)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    with Costs() as costs:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            with record_function(STEP):
                step()
            torch.ones(1000).cumsum(0)  # between two steps: none of theirs
    window = Window(events_of(profiler), costs.calls)
    rows = {kernel.name: kernel for kernel in window.kernels(Ceilings(copy=1e9, matmul={"float32": 1e9}))}
    theirs = {row.key: row for row in profiler.key_averages()}
    assert len(window.steps) == STEPS and "aten::cumsum" not in rows and STEP not in rows
    for name in ("aten::addmm", "aten::mm", "aten::gelu", "aten::gelu_backward", "aten::pow"):
        assert rows[name].seconds == pytest.approx(theirs[name].self_cpu_time_total * 1e-6, rel=0.02)
        assert (rows[name].calls, rows[name].steps) == (theirs[name].count, STEPS)
    assert rows["aten::addmm"].flops == STEPS * 2 * 32 * (64 * 256 + 256 * 8)
    assert rows["aten::gelu"].bytes == STEPS * 2 * 4 * 32 * 256
    spans = window.spans(lambda nanoseconds: (nanoseconds - window.steps[0].begin) * 1e-9)
    assert [span.name for span in spans].count("aten::linear") == 2  # of the last step
    assert all(a.begin <= b.begin for a, b in pairwise(spans)) and spans[0].begin > 0


def test_placed_under_the_ceilings() -> None:
    """In one step: 1 ms for 1 MB and 8 MFLOP, where 2 GB/s and 10 GFLOP/s would take 0.5 and 0.8 ms."""
    events = [Event(STEP, 0, 3_000_000), Event("aten::mm", 0, 1_000_000), Event("aten::add", 1_000_000, 3_000_000)]
    costs = {"aten::mm": [Cost(1e6, 8e6)], "aten::add": [Cost(2e6)], "aten::other": [Cost(1.0)]}
    (add, mm) = Window(events, costs).kernels(Ceilings(copy=2e9, matmul={"float32": 10e9}))
    assert mm == Kernel("aten::mm", 1, 1e-3, 1e6, 8e6, pytest.approx(0.2e-3), "compute", 1)
    assert add == Kernel("aten::add", 1, 2e-3, 2e6, None, pytest.approx(1e-3), "memory", 1)
    (first, _) = Window(events, costs).kernels(Ceilings())  # nothing measured
    assert first.bytes == 2e6 and first.headroom is None and first.bound is None


def test_a_step_of_other_calls_has_unknown_bytes() -> None:
    events = [Event(STEP, 0, 100), Event("aten::add", 0, 10), Event("aten::add", 10, 20)]
    (add,) = Window(events, {"aten::add": [Cost(4.0)]}).kernels(Ceilings(copy=1e9))
    assert (add.calls, add.bytes, add.headroom) == (2, None, None)


def test_kernels_of_a_gpu_are_found_by_their_launch() -> None:
    """Made by hand in CUPTI's form: the host's clock and the device's are one, a kernel runs after its launch."""
    events = [
        Event(STEP, 0, 1000),
        Event("aten::linear", 10, 100),
        Event("aten::addmm", 20, 90),
        Event("cudaLaunchKernel", 30, 40, launch=7),
        Event("cudaLaunchKernel", 50, 60, launch=8),
        Event("Optimizer.step#AdamW.step", 200, 300, annotation=True),
        Event("cudaLaunchKernel", 210, 220, launch=9),
        Event("aten::eq", 1100, 1200),  # a validation behind the step
        Event("cudaLaunchKernel", 1110, 1120, launch=10),
        Event("gemm", 500, 900, thread=77, on_device=True, launch=7),
        Event("split_k", 900, 950, thread=77, on_device=True, launch=8),
        Event("adamw_step", 950, 1450, thread=77, on_device=True, launch=9),
        Event("compare", 1450, 1500, thread=77, on_device=True, launch=10),
        Event(STEP, 500, 1450, thread=77, on_device=True, annotation=True),
    ]
    costs = {"aten::addmm": [Cost(100.0, 1000.0)], "Optimizer.step#AdamW.step": [Cost(2800.0)]}
    window = Window(events, costs)
    rows = {kernel.name: kernel for kernel in window.kernels(Ceilings(copy=1e10, matmul={"float32": 5e9}))}
    assert set(rows) == {"gemm", "split_k", "adamw_step"}
    assert rows["gemm"].flops == 1000.0 and rows["gemm"].seconds == pytest.approx(400e-9)
    assert rows["gemm"].headroom == pytest.approx(200e-9) and rows["gemm"].bound == "compute"
    assert rows["adamw_step"].bytes == 2800.0 and rows["split_k"].bytes is None
    assert [span.name for span in window.spans(float)] == ["gemm", "split_k", "adamw_step"]


def test_nesting_is_by_thread() -> None:
    outer, inner, other = Event("outer", 0, 100), Event("inner", 10, 40), Event("other", 20, 30, thread=1)
    assert nest([other, inner, outer]) in ([outer, other], [other, outer])
    assert outer.inside == [inner] and (outer.own, inner.own) == (70, 30) and other.inside == []
