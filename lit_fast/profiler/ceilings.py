"""What this very device reaches: bytes and FLOPs a second, measured, and the peak that utilization is taken of.

A roofline (Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model") needs two numbers
of a device. Data sheets give those of a device that is cold, alone and at its highest clock; here they are measured, in
less than a second, with the threads and settings that the run has.

    MFU = model FLOPs of a step / (seconds of a step * peak)       HFU = FLOPs of a step as run / (the same)

Model FLOPs leave out what activation checkpointing computes again, hardware FLOPs count it. Source: PaLM (Chowdhery et
al. 2022, arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_fast.profiler.record import Ceilings
from lit_fast.profiler.throughput import get_available_flops

MiB = 1 << 20
_BUDGET = 0.06  # s for each measurement; the best of what fits, at least five
_LARGEST = {"cpu": 1024, "cuda": 8192}  # rows of a square product: 2 n^3 FLOPs
_TOGETHER = 8  # calls that a GPU is timed over: to launch the first of them takes some us


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth and matrix rates of `device`, measured once in a process for the settings as they are.

    Returns:
        `copy`: bytes read and written a second, the best of `y.copy_(x)` and `y.add_(x)` over buffers beyond caches
        (a copy on a CPU also reads what it overwrites, an addition in place does not). `matmul`: FLOP/s by dtype, of
        square products; "tf32" where float32 products are allowed to be that; float16 on a GPU only.

    Example:
        >>> ceilings = measure_ceilings(torch.device("cpu"))
        >>> ceilings.copy > 1e8 and ceilings.matmul["float32"] > 1e8
        True
    """
    return _measured(str(device), torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.lru_cache(maxsize=8)
def _measured(name: str, threads: int, precision: str) -> Ceilings:
    device, notes = torch.device(name), []
    ceilings = Ceilings()
    began = time.perf_counter()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    with torch.no_grad():
        try:
            ceilings.copy, size, pattern = _bandwidth(device)
            notes.append(f"bandwidth: {pattern} over two buffers of {size // MiB} MiB, bytes read and written")
        except RuntimeError as error:  # no memory left, or an operation that settings forbid
            notes.append(f"no bandwidth: {_first_line(error)}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if device.type == "cuda" else 2]:
            key = str(dtype).removeprefix("torch.")
            if dtype == torch.float32 and device.type == "cuda" and precision != "highest":
                key = "tf32"
            try:
                ceilings.matmul[key], rows = _matrix_rate(device, dtype)
                notes.append(f"{key}: square products of {rows} rows")
            except RuntimeError as error:
                notes.append(f"no {key}: {_first_line(error)}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.max_memory_allocated(device) > peak:  # the run's is asked for, not that of these buffers
            torch.cuda.reset_peak_memory_stats(device)
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{threads} thread{'s' if threads > 1 else ''}"
    took = time.perf_counter() - began
    ceilings.how = f"measured at the start in {took:.1f} s on {where}, the best of several; {'; '.join(notes)}"
    return ceilings


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:120]


def _best(function: Callable[[], object], device: torch.device, budget: float = _BUDGET) -> float:
    """s of the fastest of several calls."""
    timed = _seconds_on_gpu if device.type == "cuda" else _seconds_here
    function()  # threads, handles and code that the first call makes
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 5 or (spent < budget and calls < 1000):
        took, together = timed(function, device)
        best, spent, calls = min(best, took), spent + took * together, calls + 1
    return best


def _seconds_here(function: Callable[[], object], device: torch.device) -> tuple[float, int]:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin, 1


def _seconds_on_gpu(function: Callable[[], object], device: torch.device, cuda: Any = torch.cuda) -> tuple[float, int]:
    """By the device's own clock: a copy takes 0.2 ms, and for the host to wait for one a twentieth of that."""
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    stream = cuda.current_stream(device)
    begin.record(stream)
    for _ in range(_TOGETHER):
        function()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / _TOGETHER, _TOGETHER  # from ms


def _bandwidth(device: torch.device) -> tuple[float, int, str]:
    """(bytes/s, bytes of a buffer, which pattern)"""
    size = 512 * MiB if device.type == "cuda" else max(64 * MiB, 2 * _last_level_cache())
    x = torch.zeros(size // 4, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)  # written once: no page faults below
    copied = 2 * size / _best(lambda: y.copy_(x), device)
    added = 3 * size / _best(lambda: y.add_(x), device)
    return max((copied, size, "a copy"), (added, size, "an addition in place"))


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not say."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            found.append(int(text.rstrip("KMG")) * {"K": 1024, "M": MiB, "G": 1024 * MiB}.get(text[-1], 1))
        except (OSError, ValueError):
            continue
    return min(max(found), 512 * MiB)


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """(FLOP/s, rows): twice as many rows while a product stays within the budget."""
    generator = torch.Generator(device).manual_seed(0)  # not the run's: it goes on as if nothing had been drawn
    rows = 128

    def product(rows: int) -> Callable[[], Tensor]:
        a = torch.empty(rows, rows, dtype=dtype, device=device).normal_(generator=generator)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, a, out=out)

    took = _best(product(rows), device, budget=_BUDGET / 3)
    while rows < _LARGEST.get(device.type, 1024) and 8 * took < _BUDGET:
        rows *= 2
        took = _best(product(rows), device, budget=_BUDGET / 3)
    return 2 * rows**3 / _best(product(rows), device), rows


def peak_of(device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> tuple[float | None, str | None]:
    """(peak FLOP/s in `dtype`, where it is from): the device's data sheet, or what was measured where there is none."""
    stated = get_available_flops(device, dtype) if device.type == "cuda" else None
    if stated is not None:
        return float(stated), f"data sheet of {torch.cuda.get_device_name(device)}, dense {_name(dtype)}"
    key = _name(dtype) if _name(dtype) in ceilings.matmul else "tf32" if dtype == torch.float32 else ""
    measured = ceilings.matmul.get(key)
    return measured, None if measured is None else f"measured: square products in {key} on this device"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
