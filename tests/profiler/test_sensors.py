"""Sensors: the host's for real; NVML's by the real nvidia-ml-py on a library that is none, and where there is a GPU."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_fast.profiler import sensors as room
from lit_fast.profiler.sensors import Sensors

pynvml = pytest.importorskip("pynvml")
from fake_nvml import NO_PERMISSION, NOT_SUPPORTED, FakeLibrary, install  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return install(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_host_is_read_for_real() -> None:
    before = threading.active_count()
    with Sensors(CPU, every=0.02) as sensors:
        deadline = time.monotonic() + 5
        while sensors.devices()[0].readings[0].count < 4 and time.monotonic() < deadline:
            sum(range(10000))
    (cpu,) = sensors.devices()
    readings = {reading.name: reading for reading in cpu.readings}
    memory, own = readings["resident memory"], readings["process cpu"]
    assert memory.minimum > 50e6 and memory.minimum <= memory.mean <= memory.maximum  # torch is loaded
    assert memory.count >= own.count >= 3 and own.maximum > 20.0  # this very loop, in % of a core
    assert threading.active_count() == before and sensors.notes == []


def test_what_nvml_tells(nvml: FakeLibrary, clock: list[float]) -> None:
    sensors = Sensors(GPU, every=1000.0).start()
    for power, reasons in ((200.0, 4), (400.0, 5), (300.0, 1)):
        clock[0] += 3.0
        nvml.power, nvml.reasons, nvml.joules, nvml.ecc = power, reasons, nvml.joules + 900.0, 9
        sensors.read()
    clock[0] += 3.0
    sensors.stop()
    gpu, host = sensors.devices()
    assert gpu.name == "NVIDIA Fake" and host.name == "CPU"
    power = next(reading for reading in gpu.readings if reading.name == "power")
    assert (power.minimum, power.maximum, power.count, power.mean) == (200.0, 400.0, 5, 300.0)
    assert gpu.throttled == {"power cap": 6.0}  # being idle is no reason
    assert (gpu.energy, gpu.energy_seconds) == (2700.0, 12.0)
    assert gpu.errors["ECC corrected"] == 2 and gpu.errors["NVLink replays"] == 4  # 2 more on each of two links
    assert gpu.errors["rows remapped"] == 3
    values = {reading.name: reading.mean for reading in gpu.readings}
    assert values["sm active"] == 20.0 and values["tensor cores active"] == 50.0 and values["dram bandwidth"] == 100.0
    assert nvml.samples == {} and nvml.calls[-1] == "nvmlShutdown" and sensors.notes == []


def test_what_is_refused_is_noted_once(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    refused = ["nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTotalEccErrors"]
    refused += ["nvmlDeviceGetNvLinkState", "nvmlDeviceGetRemappedRows"]
    nvml = install(monkeypatch, **dict.fromkeys(refused, NOT_SUPPORTED), nvmlGpmMetricsGet=NO_PERMISSION)
    sensors = Sensors(GPU, every=1000.0).start()
    for _ in range(3):
        clock[0] += 1.0
        sensors.read()
    sensors.stop()
    gpu = sensors.devices()[0]
    assert {reading.name for reading in gpu.readings} >= {"sm clock", "temperature"}
    assert "power" not in {reading.name for reading in gpu.readings} and gpu.errors == {} and gpu.throttled == {}
    for wanted in (
        "no power, NVMLError_NotSupported: Not Supported",
        "no clock-event reasons",
        "no GPM counters, NVMLError_NoPermission: Insufficient Permissions",
        "no ECC corrected",
        "no remapped rows",
        "no energy, its counter",
    ):
        assert sum(wanted in note for note in sensors.notes) == 1, sensors.notes
    assert gpu.energy is None and nvml.calls.count("nvmlDeviceGetPowerUsage") == 1


def test_no_driver_and_no_package_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, nvmlInitWithFlags=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with Sensors(GPU, every=1000.0) as sensors:
        assert [device.name for device in sensors.devices()] == ["CPU"]
    assert sensors.notes == ["NVML: no sensors, NVMLError_DriverNotLoaded: Driver Not Loaded"]
    monkeypatch.setitem(sys.modules, "psutil", None)
    with Sensors(CPU, every=1000.0) as sensors:
        assert sensors.devices() == []
    assert "lit-fast[profile]" in sensors.notes[0]


def test_a_part_of_a_device_goes_by_its_own_name(nvml: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml.nvmlInit()
    nvml.uuids = {b"MIG-b"}
    assert room.nvml_handle(pynvml, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="MIG-b"))
    assert room.nvml_handle(pynvml, GPU)
    nvml.uuids = {b"GPU-other"}
    with pytest.raises(pynvml.NVMLError_NotFound):
        room.nvml_handle(pynvml, GPU)


def test_a_device_that_is_lost_is_one_note_and_the_run_goes_on(nvml: FakeLibrary, clock: list[float]) -> None:
    sensors = Sensors(GPU, every=1000.0).start()
    for second in range(4):
        clock[0] += 2.0
        nvml.joules += 600.0
        nvml.lost = second >= 3
        sensors.read()
    asked = len(nvml.calls)
    sensors.read()
    assert len(nvml.calls) == asked  # it is not asked again
    sensors.stop()
    assert sensors.notes == ["NVML: its sensors end 8 s after they began, NVMLError_GpuIsLost: GPU is lost"]
    gpu, host = sensors.devices()
    readings = {reading.name: reading for reading in gpu.readings}
    assert readings["power"].count == 4 and (gpu.energy, gpu.energy_seconds) == (1800.0, 6.0)
    assert next(reading.count for reading in host.readings if reading.name == "resident memory") == 1 + 4 + 1 + 1
    assert gpu.errors["NVLink replays"] == 0 and gpu.errors["rows remapped"] == 3


def test_names_that_come_and_go_with_releases(
    nvml: FakeLibrary, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """The driver of CUDA 14 has no nvmlDeviceGetTemperature; a package of before 12.535 says "throttle"."""
    monkeypatch.delattr(FakeLibrary, "nvmlDeviceGetTemperature")
    for name in [name for name in vars(pynvml) if "ClocksEventReason" in name]:
        monkeypatch.delattr(pynvml, name)
    monkeypatch.setattr(
        FakeLibrary, "nvmlDeviceGetCurrentClocksThrottleReasons",
        FakeLibrary.nvmlDeviceGetCurrentClocksEventReasons, raising=False,
    )  # fmt: skip
    nvml.reasons = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    sensors = Sensors(GPU, every=1000.0).start()
    clock[0] += 2.0
    sensors.stop()
    gpu = sensors.devices()[0]
    assert gpu.throttled == {"thermal (hardware)": 2.0}
    assert next(reading.mean for reading in gpu.readings if reading.name == "temperature") == 61.0


def test_every_name_that_is_asked_for_is_in_the_package() -> None:
    source = Path(room.__file__).read_text()
    names = set(re.findall(r"\bnvml\.(\w+)", source)) | set(room._GPM) | set(room._REASONS)
    names |= {f"NVML_MEMORY_ERROR_TYPE_{kind}" for kind in ("CORRECTED", "UNCORRECTED")}
    names |= {f"NVML_NVLINK_ERROR_DL_{kind}" for kind in ("REPLAY", "RECOVERY", "CRC_FLIT")}
    assert len(names) > 35 and [name for name in sorted(names) if not hasattr(pynvml, name)] == []


# -- on a GPU


@pytest.mark.gpu
def test_a_real_gpu_tells_what_it_should() -> None:
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with Sensors(GPU, every=0.5) as sensors:
        end = time.monotonic() + 6.0
        while time.monotonic() < end:
            for _ in range(20):
                weight @ weight
            torch.cuda.synchronize()
    gpu = sensors.devices()[0]
    readings = {reading.name: reading for reading in gpu.readings}
    assert gpu.name == torch.cuda.get_device_name(GPU)
    assert readings["gpu utilization"].maximum > 50 and readings["device memory"].minimum > 32 << 20, sensors.notes
    assert 50 < readings["power"].maximum < 2000 and 300 < readings["sm clock"].maximum < 4000
    assert 10 < readings["temperature"].mean < 110
    if gpu.energy is not None and gpu.energy_seconds is not None:  # the power sensor sees a part of the time
        assert gpu.energy / gpu.energy_seconds == pytest.approx(readings["power"].mean, rel=0.5)
    print(sensors.notes, gpu)
