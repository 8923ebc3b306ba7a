"""NVIDIA's management library without a GPU: the C functions that nvidia-ml-py calls, one device behind them.

The package itself is the real one, and so are its argument order, structures, constants and exceptions. What is not
here is not found by it, as in a driver that is too old.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

NOT_SUPPORTED: int = pynvml.NVML_ERROR_NOT_SUPPORTED
NO_PERMISSION: int = pynvml.NVML_ERROR_NO_PERMISSION
LOST: int = pynvml.NVML_ERROR_GPU_IS_LOST
OK, NOT_FOUND, INVALID_ARGUMENT = 0, 6, 2
LINKS = 2


def target(reference: Any) -> Any:
    """What a `byref` refers to."""
    return reference._obj


def address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def point(pointer: Any, to: int) -> None:
    ctypes.memmove(ctypes.addressof(pointer), ctypes.addressof(ctypes.c_void_p(to)), ctypes.sizeof(ctypes.c_void_p))


class FakeLibrary:
    """One device, "GPU-b". Functions in `refused` return their code there instead of doing anything."""

    def __init__(self, **refused: int) -> None:
        self.refused = refused
        self.calls: list[str] = []
        self.uuids = {b"GPU-b"}
        self.power, self.joules, self.reasons, self.ecc = 300.0, 0.0, 0, 7
        self.device = ctypes.create_string_buffer(8)
        self.samples: dict[int, tuple[Any, list[int]]] = {}  # by address: its memory, when it was taken
        self.lost = False

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("nvml"):
            return found

        def call(*args: Any) -> int:
            self.calls.append(name)
            if self.lost and name != "nvmlShutdown":
                return LOST
            return self.refused.get(name) or found(*args) or OK

        return call

    def _check(self, handle: Any) -> None:
        assert address(handle) == ctypes.addressof(self.device)

    def nvmlInitWithFlags(self, flags: int) -> None:
        assert flags == 0

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        if uuid.value not in self.uuids:
            return NOT_FOUND
        point(target(device), ctypes.addressof(self.device))
        return OK

    def nvmlDeviceGetName(self, handle: Any, text: Any, length: Any) -> None:
        self._check(handle)
        assert length.value > 12
        text.value = b"NVIDIA Fake"

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> None:
        self._check(handle)
        target(rates).gpu, target(rates).memory = 80, 40

    def nvmlDeviceGetClockInfo(self, handle: Any, clock: Any, megahertz: Any) -> None:
        self._check(handle)
        target(megahertz).value = {pynvml.NVML_CLOCK_SM: 1000, pynvml.NVML_CLOCK_MEM: 2000}[clock.value]

    def nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> None:
        self._check(handle)
        target(milliwatts).value = round(1e3 * self.power)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, degrees: Any) -> None:
        self._check(handle)
        assert sensor.value == pynvml.NVML_TEMPERATURE_GPU
        target(degrees).value = 60

    def nvmlDeviceGetTemperatureV(self, handle: Any, temperature: Any) -> None:
        self._check(handle)
        assert target(temperature).version == pynvml.nvmlTemperature_v1
        target(temperature).temperature = 61

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> None:
        self._check(handle)
        target(memory).total, target(memory).used = 1 << 37, 1 << 30

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, reasons: Any) -> None:
        self._check(handle)
        target(reasons).value = self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, millijoules: Any) -> None:
        self._check(handle)
        target(millijoules).value = round(1e3 * self.joules)

    def nvmlDeviceGetTotalEccErrors(self, handle: Any, kind: Any, counter: Any, count: Any) -> None:
        self._check(handle)
        assert kind.value in (0, 1) and counter.value == pynvml.NVML_VOLATILE_ECC
        target(count).value = self.ecc

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int, active: Any) -> int:
        self._check(handle)
        target(active).value = int(link < LINKS)
        return OK if link <= LINKS else INVALID_ARGUMENT

    def nvmlDeviceGetNvLinkErrorCounter(self, handle: Any, link: int, counter: int, count: Any) -> int:
        self._check(handle)
        target(count).value = 5 + self.ecc
        return OK if link < LINKS and 0 <= counter <= 2 else INVALID_ARGUMENT

    def nvmlDeviceGetRemappedRows(self, handle: Any, right: Any, wrong: Any, pending: Any, failed: Any) -> None:
        self._check(handle)
        target(right).value, target(wrong).value, target(pending).value, target(failed).value = 1, 2, 0, 0

    def nvmlGpmQueryDeviceSupport(self, handle: Any, support: Any) -> None:
        self._check(handle)
        assert target(support).version == pynvml.NVML_GPM_SUPPORT_VERSION
        target(support).isSupportedDevice = 1

    def nvmlGpmSampleAlloc(self, sample: Any) -> None:
        memory = ctypes.create_string_buffer(8)
        self.samples[ctypes.addressof(memory)] = (memory, [])
        point(target(sample), ctypes.addressof(memory))

    def nvmlGpmSampleGet(self, handle: Any, sample: Any) -> None:
        self._check(handle)
        self.samples[address(sample)][1].append(len(self.calls))

    def nvmlGpmSampleFree(self, sample: Any) -> None:
        del self.samples[address(sample)]

    def nvmlGpmMetricsGet(self, asked: Any) -> int:
        wanted = target(asked)
        assert wanted.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        older, newer = (self.samples[address(sample)][1] for sample in (wanted.sample1, wanted.sample2))
        if not older or not newer or older[-1] >= newer[-1]:
            return INVALID_ARGUMENT
        for metric in wanted.metrics[: wanted.numMetrics]:
            metric.value, metric.nvmlReturn = 10.0 * metric.metricId, OK
        return OK


def install(monkeypatch: pytest.MonkeyPatch, **refused: int) -> FakeLibrary:
    """nvidia-ml-py has this library from here on, and torch's device is its device."""
    library = FakeLibrary(**refused)
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b"))
    return library
