"""Kernels of a window: the CPU's against torch.profiler's own table; a GPU's on events as CUPTI gives them."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from heart_models import Plain, batches, fitted
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

import lit_fast
from lit_fast.optim import adopt
from lit_fast.optim.traffic import Pass, passes_of
from lit_fast.profiler import DeepProfiler
from lit_fast.profiler.costs import Cost, Costs
from lit_fast.profiler.files import read, write
from lit_fast.profiler.kernels import STEP, Event, Window, _short, events_of, is_ours, nest
from lit_fast.profiler.record import Ceilings, Kernel, Profile
from lit_fast.profiler.report import facts
from lit_fast.profiler.report.units import seconds

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


# -- what a device did


def kernels(*made: tuple[str, int, int]) -> list[Event]:
    return [Event(name, begin, end, on_device=True) for name, begin, end in made]


ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def test_a_devices_time_is_told_by_its_intervals(tmp_path: Path) -> None:
    """Two steps from 1,000 to 11,000 ns for the host; the device ends at 12,000."""
    events = [
        Event(STEP, 1_000, 5_000),
        Event(STEP, 6_000, 11_000),
        *kernels(
            ("gemm", 2_000, 4_000),
            ("gelu", 3_500, 4_500),  # on another stream, beside it: 2,500 together
            (ALL_REDUCE, 4_000, 5_500),  # 500 behind gelu
            ("Memcpy HtoD (Pinned -> Device)", 5_000, 5_800),  # 500 beside the all-reduce
            ("Memset (Device)", 5_800, 5_900),
            ("gemm", 7_000, 9_000),
            ("ncclKernel_AllGather_RING_LL_Sum_int8_t(ncclWorkElem)", 8_000, 8_600),  # behind gemm, all of it
            ("Memcpy DtoH (Device -> Pinned)", 9_000, 9_200),
            ("void lit_fast::cuda::direct_kernel<lit_fast::AdamW, 259u>(T)", 11_500, 12_000),
        ),
        Event("nccl:all_reduce", 4_000, 6_500, on_device=True, annotation=True),  # a range, not a kernel
        *kernels(("gemm", 0, 900), ("gemm", 900, 1_100)),  # of before; 100 in the window
    ]
    found = Window(events, {}, batches=2).on_device()
    assert found is not None
    busy = 100 + (5_900 - 2_000) + (9_200 - 7_000) + 500
    expected = {
        "seconds": 11_000,
        "idle": 11_000 - busy,
        "compute": 100 + 2_500 + 2_000 + 500,
        "communication": 1_500 + 600,
        "exposed": 1_000,
        "overlapped": 500 + 600,
        "to_device": 800,
        "to_host": 200,
    }
    assert {name: round(value * 1e9, 6) for name, value in vars(found).items() if name != "steps"} == expected
    assert found.steps == 4
    profile = Profile(device_window=found)
    write(profile, tmp_path / "rank-00000.json")
    kept = read(tmp_path / "rank-00000.json")
    assert isinstance(kept, Profile) and kept.device_window == found
    assert facts.device_window(profile)[-1] == f"idle {seconds(expected['idle'] * 1e-9 / 4)}"


def test_without_a_device_there_is_no_window_of_it() -> None:
    assert Window([Event(STEP, 0, 10), Event("aten::add", 0, 5)], {}).on_device() is None
    assert facts.device_window(Profile()) == []


def test_no_range_of_a_users_is_a_launch() -> None:
    """Operations and ranges have numbers, too, which need not differ from those of launches."""
    events = [
        Event(STEP, 0, 1_000),
        Event("custom_loss", 10, 400, launch=7, annotation=True),
        Event("cutlass::gemm", 20, 90, launch=7),
        Event("cudaLaunchKernelExC_v11060", 30, 40, launch=7),
        Event("curious", 1_100, 1_200, launch=7, annotation=True),
        *[Event("gemm", 500, 900, on_device=True, launch=7)],
    ]
    window = Window(events, {})
    (launch,) = (e for e in events if e.kernels)
    assert launch.name == "cudaLaunchKernelExC_v11060" and len(window.device) == 1


# -- kernels of ours


ROOT = Path(__file__).parents[2]


def kernels_of_cuda() -> dict[str, Path]:
    """Every kernel in csrc/cuda by name."""
    found = {}
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        for name in re.findall(r"__global__[^;{]*?\b(\w+)\((?!k|\w+\))", path.read_text()):
            if name != "__launch_bounds__":
                found[name] = path
    return found


def kernels_of_triton() -> dict[str, str]:
    """Every kernel in lit_fast/triton that is launched, and not called by another: with what it is decorated."""
    found = {}
    for path in sorted((ROOT / "lit_fast" / "triton").glob("*.py")):
        text = path.read_text()
        for name in re.findall(r"(\w+)\[\(.*\)\]\(", text):
            home = next(p for p in path.parent.glob("*.py") if f"def {name}(" in p.read_text())
            found[name] = re.search(rf"(@triton.jit.*)\ndef {name}\(", home.read_text())[1]
    return found


def test_every_kernel_in_the_sources_is_known_as_ours() -> None:
    cuda, by_triton = kernels_of_cuda(), kernels_of_triton()
    names = {"direct_kernel", "staged_kernel", "measure_kernel", "square_kernel", "scale_kernel", "prepare_kernel"}
    assert set(cuda) == {*names, "pack_kernel", "sum_kernel"}
    assert sum(path.read_text().count("__global__") for path in set(cuda.values())) == len(cuda)
    for name, path in cuda.items():
        assert "namespace lit_fast::cuda {" in path.read_text()
        assert is_ours(f"void lit_fast::cuda::{name}<float>(Table)") and is_ours(f"lit_fast::cuda::{name}(Table)")
    assert set(by_triton) == {"square_kernel", "prepare_kernel", "step_kernel", "scale_kernel"}
    for name, decorator in by_triton.items():
        assert f'repr=named("{name}")' in decorator and is_ours(f"lit_fast_{name}")
    for other in ("void at::native::vectorized_elementwise_kernel<4>", "triton_poi_fused_0", "step_kernel"):
        assert not is_ours(other)


def test_nvcc_names_kernels_as_expected(tmp_path: Path) -> None:
    for tool in ("nvcc", "readelf", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"not installed: {tool}")
    source, binary = tmp_path / "names.cu", tmp_path / "names.cubin"
    source.write_text(
        """
        #include <cuda_runtime.h>
        #include <cstring>
        #include "cuda/measure.cuh"
        #include "cuda/gradients.cuh"
        namespace lit_fast::cuda {
        void* keep[] = {(void*)square_kernel, (void*)scale_kernel, (void*)prepare_kernel};
        #define TABLES const __grid_constant__ StepTable, const __grid_constant__ DeviceScale
        template __global__ void staged_kernel<Muon, kGeneral | 1>(TABLES);
        template __global__ void direct_kernel<RmsProp, kGeneral | 1, float, bf16, false>(TABLES);
        template __global__ void measure_kernel<Lamb, kGeneral | 3, Layout::staged>(
            TABLES, const __grid_constant__ Measurement);
        }
        """
    )
    flags = ["-std=c++17", "-O0", "--fmad=false", "-arch=sm_90", "-cubin", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["nvcc", *flags, str(source), "-o", str(binary)], check=True, capture_output=True)
    table = subprocess.run(["readelf", "-sW", str(binary)], check=True, capture_output=True, text=True).stdout
    mangled = [line.split()[-1] for line in table.splitlines() if " FUNC " in line and "$" not in line]
    said = subprocess.run(["c++filt", *mangled], check=True, capture_output=True, text=True).stdout.splitlines()
    assert {_short(name) for name in said} == {
        "lit_fast square_kernel",
        "lit_fast scale_kernel",
        "lit_fast prepare_kernel",
        "lit_fast staged_kernel<Muon, 257u>",
        "lit_fast direct_kernel<RmsProp, 257u, float, bf16, false>",
        "lit_fast measure_kernel<Lamb, 259u, (Layout)6>",
    }
    weights = {"rmsprop": torch.ones(8, 4), "lamb": torch.ones(8, 4), "muon": torch.ones(8, 4)}
    kinds = {"rmsprop": lit_fast.optim.RMSprop, "lamb": lit_fast.optim.Lamb, "muon": lit_fast.optim.Muon}
    for name, weight in weights.items():
        param = nn.Parameter(weight)
        optimizer = kinds[name]([param])
        param.grad = torch.ones(8, 4)
        optimizer.step()
        for each in passes_of(adopt(optimizer)):
            matching = [kernel for kernel in said if re.search(each.kernels, kernel, re.IGNORECASE)]
            assert len(matching) == (0 if each.name in ("second pass", "lamb") else 1), (each, matching)


def on_a_gpu(*launches: tuple[str, int]) -> list[Event]:
    """Two steps, each with kernels of these names and durations (ns) that an AdamW's step has launched."""
    events = []
    for step in range(2):
        at = 1_000_000 * step
        events += [Event(STEP, at, at + 900_000), Event("Optimizer.step#AdamW.step", at, at + 800_000, annotation=True)]
        for number, (name, took) in enumerate(launches):
            launch, begin = 100 * step + number + 1, at + 10_000 * number
            events.append(Event("cudaLaunchKernel", begin, begin + 100, launch=launch))
            events.append(Event(name, begin + 5_000, begin + 5_000 + took, on_device=True, launch=launch))
    return events


def adamws(clip: float | None) -> list[Pass]:
    param = nn.Parameter(torch.ones(1000))
    adopted = adopt(torch.optim.AdamW([param]), max_norm=clip)
    param.grad = torch.ones(1000)
    adopted.step()
    return passes_of(adopted)


def test_passes_are_credited_to_their_kernels() -> None:
    step = "void lit_fast::cuda::direct_kernel<lit_fast::AdamW, 259u, float, float, false>(StepTable, DeviceScale)"
    events = on_a_gpu(
        ("lit_fast::cuda::square_kernel(GradTable, double*)", 400),
        ("lit_fast::cuda::prepare_kernel(PrepareTable)", 200),
        (step, 1000), (step, 1500),
    )  # fmt: skip
    window = Window(events, {}, compiled={"AdamW": [adamws(1.0)]})
    rows = {kernel.name: kernel for kernel in window.kernels(Ceilings(copy=1e12))}
    taken = rows["lit_fast direct_kernel<AdamW, 259u, float, float, false>"]
    assert (taken.calls, taken.seconds, taken.steps) == (4, pytest.approx(5e-6), 2)
    assert taken.bytes == 2 * 28 * 1000 and taken.flops == 2 * 15 * 1000
    assert rows["lit_fast square_kernel"].bytes == 2 * 4 * 1000
    assert rows["lit_fast prepare_kernel"].bytes is None


def test_passes_of_triton_are_one_kernel() -> None:
    events = on_a_gpu(("lit_fast_prepare_kernel", 200), ("lit_fast_step_kernel", 1000))
    window = Window(events, {}, compiled={"AdamW": [adamws(None)]})
    rows = {kernel.name: kernel for kernel in window.kernels(Ceilings(copy=1e12))}
    assert rows["lit_fast step_kernel"].bytes == 2 * 28 * 1000


def test_an_optimizer_that_steps_otherwise_than_once_a_step_has_no_bytes() -> None:
    events = [e for e in on_a_gpu(("lit_fast_step_kernel", 1000)) if not (e.annotation and e.begin > 500_000)]
    (row,) = Window(events, {}, compiled={"AdamW": [adamws(None)]}).kernels(Ceilings(copy=1e12))
    assert row.bytes is None


def test_a_clipped_step_on_the_cpu_has_its_norm_as_a_row() -> None:
    profiler = DeepProfiler(skip=1, window=3)
    model = Plain(lambda p: torch.optim.AdamW(p, lr=0.01))
    fitted(model, batches(8), max_epochs=1, profiler=profiler, gradient_clip_val=100.0)
    rows = {kernel.name: kernel for kernel in profiler.profile().kernels}
    parameters = sum(p.numel() for p in model.parameters())
    assert rows["lit_fast gradient_norm"].bytes == 3 * 4 * parameters and rows["lit_fast gradient_norm"].calls == 3
    assert rows["lit_fast AdamW step"].bytes == 3 * 28 * parameters


# -- on a GPU


@pytest.mark.gpu
def test_times_of_a_gpus_kernels_are_those_of_torch() -> None:
    from torch.autograd import DeviceType

    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).cuda()
    adopted = adopt(torch.optim.AdamW(model.parameters(), lr=1e-3), max_norm=1.0)
    x = torch.randn(256, 512).pin_memory()

    def step() -> None:
        adopted.zero_grad()
        model(x.to("cuda", non_blocking=True)).square().mean().backward()
        adopted.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            with record_function(STEP):
                step()
            time.sleep(0.005)
    window = Window(events_of(profiler), {}, compiled={"AdamW": [passes_of(adopted)]})
    rows = {kernel.name: kernel for kernel in window.kernels(Ceilings(copy=1e12))}
    theirs: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            theirs.setdefault(window._shown(event.name), []).append(event.time_range.elapsed_us() * 1e-6)
    assert rows and set(rows) <= set(theirs)
    for name, row in rows.items():
        assert (row.calls, row.seconds) == (len(theirs[name]), pytest.approx(sum(theirs[name]), rel=0.02, abs=1e-7))
    ours = {name: row for name, row in rows.items() if name.startswith("lit_fast ")}
    parameters = sum(p.numel() for p in model.parameters())
    known = [row for row in ours.values() if row.bytes is not None]
    assert sum(row.bytes or 0.0 for row in known) == pytest.approx(STEPS * (28 + 4) * parameters), sorted(ours)
    found = window.on_device()
    assert found is not None and found.idle >= (STEPS - 1) * 0.004 and found.to_device > 0
    covered = found.seconds - found.idle
    assert max(found.compute, found.to_device) <= covered <= found.compute + found.to_device + found.to_host + 1e-3
