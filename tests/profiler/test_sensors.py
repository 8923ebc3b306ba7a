"""Sensors: the host's for real; NVML's on a fake of nvidia-ml-py, no GPU being there."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_fast.profiler import sensors as room
from lit_fast.profiler.sensors import Sensors

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class NVMLError(Exception):
    pass


class FakeNVML:
    """One device, "GPU-b", that another process sees as number 1; whatever is in `refused` raises."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, NVML_VOLATILE_ECC = 1, 2, 0, 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_NVLINK_MAX_LINKS, NVML_SUCCESS, NVML_GPM_METRICS_GET_VERSION = 3, 0, 1
    NVML_NVLINK_ERROR_DL_REPLAY, NVML_NVLINK_ERROR_DL_RECOVERY, NVML_NVLINK_ERROR_DL_CRC_FLIT = 0, 1, 2
    NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_SM_OCCUPANCY = 2, 3
    NVML_GPM_METRIC_ANY_TENSOR_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL = 5, 10
    nvmlClocksEventReasonSwPowerCap, nvmlClocksEventReasonGpuIdle = 4, 1

    def __init__(self, refused: tuple[str, ...] = ()) -> None:
        self.refused = refused
        self.calls: list[str] = []
        self.power, self.joules, self.reasons, self.ecc, self.freed = 300e3, 0.0, 0, 7, 0

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        if name.startswith("nvml") and not name.startswith("nvmlClocks"):
            get(self, "calls").append(name)
            if name in get(self, "refused"):

                def refuse(*_: Any) -> None:
                    raise NVMLError(f"{name}: Not Supported")

                return refuse
        return get(self, name)

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-b":
            raise NVMLError("Not Found")
        return "handle b"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        assert handle == "handle b"
        return b"NVIDIA Fake"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=80, memory=40)

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return 1000 * clock

    def nvmlDeviceGetPowerUsage(self, handle: str) -> float:
        return self.power

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 60

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:
        return self.joules * 1e3

    def nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        return self.ecc

    def nvmlDeviceGetNvLinkState(self, handle: str, link: int) -> int:
        return int(link < 2)

    def nvmlDeviceGetNvLinkErrorCounter(self, handle: str, link: int, counter: int) -> int:
        return 5 + self.ecc

    def nvmlDeviceGetRemappedRows(self, handle: str) -> tuple[int, int, int, int]:
        return 1, 2, 0, 0

    def nvmlGpmQueryDeviceSupport(self, handle: str) -> Any:
        return SimpleNamespace(isSupportedDevice=1)

    def nvmlGpmSampleAlloc(self) -> list[int]:
        return []

    def nvmlGpmSampleGet(self, handle: str, sample: list[int]) -> None:
        sample.append(len(self.calls))

    def nvmlGpmSampleFree(self, sample: list[int]) -> None:
        self.freed += 1

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        return SimpleNamespace(metrics=[SimpleNamespace(nvmlReturn=0, value=0.0, metricId=0) for _ in range(8)])

    def nvmlGpmMetricsGet(self, asked: Any) -> None:
        assert asked.sample1[-1] < asked.sample2[-1]  # the older one first
        for metric in asked.metrics[: asked.numMetrics]:
            metric.value = 10.0 * metric.metricId


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    return with_nvml(monkeypatch)


def with_nvml(monkeypatch: pytest.MonkeyPatch, *refused: str) -> FakeNVML:
    fake = FakeNVML(refused)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b"))
    return fake


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


def test_what_nvml_tells(nvml: FakeNVML, clock: list[float]) -> None:
    sensors = Sensors(GPU, every=1000.0).start()
    for power, reasons in ((200e3, 4), (400e3, 5), (300e3, 1)):
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
    assert nvml.freed == 2 and nvml.calls[-1] == "nvmlShutdown" and sensors.notes == []


def test_what_is_refused_is_noted_once(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    refused = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlGpmMetricsGet")
    refused += ("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetNvLinkState", "nvmlDeviceGetRemappedRows")
    nvml = with_nvml(monkeypatch, *refused)
    sensors = Sensors(GPU, every=1000.0).start()
    for _ in range(3):
        clock[0] += 1.0
        sensors.read()
    sensors.stop()
    gpu = sensors.devices()[0]
    assert {reading.name for reading in gpu.readings} >= {"sm clock", "temperature"}
    assert "power" not in {reading.name for reading in gpu.readings} and gpu.errors == {} and gpu.throttled == {}
    for wanted in (
        "no power",
        "no clock-event reasons",
        "no GPM counters",
        "no ECC corrected",
        "no energy, its counter",
    ):
        assert sum(wanted in note for note in sensors.notes) == 1, sensors.notes
    assert gpu.energy is None and nvml.calls.count("nvmlDeviceGetPowerUsage") == 1


def test_no_driver_and_no_package_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvml(monkeypatch, "nvmlInit")
    with Sensors(GPU, every=1000.0) as sensors:
        assert [device.name for device in sensors.devices()] == ["CPU"]
    assert sensors.notes == ["NVML: no sensors, NVMLError: nvmlInit: Not Supported"]
    monkeypatch.setitem(sys.modules, "psutil", None)
    with Sensors(CPU, every=1000.0) as sensors:
        assert sensors.devices() == []
    assert "lit-fast[profile]" in sensors.notes[0]


def test_a_part_of_a_device_goes_by_its_own_name(nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", {"MIG-b": "part"}.get)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="MIG-b"))
    assert room.nvml_handle(nvml, GPU) == "part"
