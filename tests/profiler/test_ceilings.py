"""Ceilings are measured: of this machine for real, of a GPU never here."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import FakeCuda

from lit_fast.profiler import ceilings as room
from lit_fast.profiler.ceilings import measure_ceilings, peak_of
from lit_fast.profiler.record import Ceilings

CPU = torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that other processes interrupt wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_measured_rates_are_reached_and_not_passed_by_far(one_thread: None) -> None:
    before = torch.get_rng_state()
    ceilings = measure_ceilings(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert ceilings.copy is not None and set(ceilings.matmul) == {"float32", "bfloat16"}
    x = torch.zeros(32 << 20)
    y = torch.zeros_like(x)
    a = torch.ones(512, 512)
    took, multiplied = [], []
    for _ in range(5):
        begin = time.perf_counter()
        y.copy_(x)
        took.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        a @ a
        multiplied.append(time.perf_counter() - begin)
    # Other processes and caches take their share of either measurement: orders of magnitude, not per cent.
    assert 0.1 < 2 * 4 * x.numel() / min(took) / ceilings.copy < 5
    assert 0.1 < 2 * 512**3 / min(multiplied) / ceilings.matmul["float32"] < 10
    assert "bytes read and written" in ceilings.how and "float32: square products of" in ceilings.how


def test_measured_once_for_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    room._measured.cache_clear()
    calls = []
    monkeypatch.setattr(room, "_bandwidth", lambda device: (calls.append(device), (1e9, 1 << 20, "a copy"))[1])
    monkeypatch.setattr(room, "_matrix_rate", lambda device, dtype: (2e9, 128))
    assert measure_ceilings(CPU) is measure_ceilings(CPU) and calls == [CPU]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert "7 threads" in measure_ceilings(CPU).how and len(calls) == 2
    room._measured.cache_clear()


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    room._measured.cache_clear()

    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory\nat a place")

    monkeypatch.setattr(room, "_bandwidth", refuse)
    monkeypatch.setattr(room, "_matrix_rate", refuse)
    ceilings = measure_ceilings(CPU)
    assert (ceilings.copy, ceilings.matmul) == (None, {}) and "no bandwidth: out of memory;" in ceilings.how
    room._measured.cache_clear()


def test_the_peak_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Ceilings(1e9, {"float32": 5e10, "tf32": 3e14})
    assert peak_of(CPU, torch.float32, measured) == (5e10, "measured: square products in float32 on this device")
    assert peak_of(CPU, torch.bfloat16, measured) == (None, None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak, source = peak_of(torch.device("cuda"), torch.bfloat16, measured)
    assert peak == 989.4e12 and source == "data sheet of NVIDIA H100 80GB HBM3, dense bfloat16"


def test_a_gpu_is_timed_by_its_own_clock() -> None:
    cuda, device = FakeCuda(), torch.device("cuda", 0)
    cuda.host(1_000_000)

    def copy() -> None:
        cuda.host(9_000)  # 9 us to launch what takes 250
        cuda.launch(250_000)

    took, together = room._seconds_on_gpu(copy, device, cuda)
    assert (took, together) == (pytest.approx((9e-6 + together * 250e-6) / together, rel=1e-9), 8)
    assert abs(took / 250e-6 - 1) < 0.005 and cuda.waited == 1


@pytest.mark.gpu
def test_ceilings_of_a_real_gpu_are_near_its_data_sheet() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    room._measured.cache_clear()
    ceilings = measure_ceilings(device)
    assert torch.cuda.max_memory_allocated(device) < 512 << 20  # of its buffers nothing is left in the run's peak
    peak, source = peak_of(device, torch.bfloat16, ceilings)
    assert ceilings.copy is not None and ceilings.copy > 1e11, ceilings.how
    if peak is not None and source is not None and source.startswith("data sheet"):
        assert 0.4 < ceilings.matmul["bfloat16"] / peak < 1.05, ceilings.how
