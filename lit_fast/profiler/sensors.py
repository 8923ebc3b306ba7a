"""What the machine does meanwhile: a thread reads its sensors about once a second and keeps means and extremes.

NVIDIA's through NVML (nvidia-ml-py), the CPU's through psutil. A sensor that is missing or not permitted is a note, and
is never asked again. Energy comes from the device's own counter, which ticks every 20 to 100 ms, and is only told of a
window that is long against that; the power sensor itself sees a part of the time (a quarter on A100 and H100: arXiv
2312.02741), so that its mean is no measure of energy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from lit_fast.profiler.record import Device, Reading

ENERGY_WINDOW = 5.0  # s: a tick of 100 ms is 2 % of it
ERRORS_EVERY = 10  # readings: they are asked link by link
_REASONS = {  # NVML's clock-event reasons; "idle" is none that slows anybody down
    "nvmlClocksEventReasonApplicationsClocksSetting": "application clocks",
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal (software)",
    "nvmlClocksEventReasonHwThermalSlowdown": "thermal (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonDisplayClockSetting": "display clocks",
    "nvmlClocksThrottleReasonBoardLimit": "board limit",
    "nvmlClocksThrottleReasonReliability": "reliability",
}
# Of these no later call can recover.
_FATAL = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired", "NVMLError_Uninitialized", "NVMLError_DriverNotLoaded")
_GPM = {  # counters of the device's own, on Hopper and newer: percent of the time between two samples
    "NVML_GPM_METRIC_SM_UTIL": "sm active",
    "NVML_GPM_METRIC_SM_OCCUPANCY": "sm occupancy",
    "NVML_GPM_METRIC_ANY_TENSOR_UTIL": "tensor cores active",
    "NVML_GPM_METRIC_DRAM_BW_UTIL": "dram bandwidth",
}


class Sensors:
    """Reads the sensors of this process's device and of its host, in a thread of its own.

    Args:
        device: the device that the process trains on.
        every: s between two readings.

    Example:
        >>> with Sensors(torch.device("cpu"), every=0.01) as sensors:
        ...     time.sleep(0.05)
        >>> "cpu utilization" in [reading.name for reading in sensors.devices()[0].readings]
        True
    """

    def __init__(self, device: torch.device, every: float = 1.0) -> None:
        self.notes: list[str] = []
        self._every = every
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._device = device
        self._sources: list[_Host | _Nvidia] = []

    def start(self) -> Sensors:
        """Find the sensors, read them once, and go on reading."""
        for kind, wanted in ((_Host, True), (_Nvidia, self._device.type == "cuda")):
            if wanted:
                try:
                    self._sources.append(kind(self._device, self.notes))
                except Exception as error:  # whatever a driver, or the lack of one, raises
                    self.notes.append(f"{kind.of}: no sensors, {_said(error)}")
        self.read()
        self._thread = threading.Thread(target=self._run, name="lit_fast sensors", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Read once more, and end the thread."""
        if self._thread is None:
            return
        self._done.set()
        self._thread.join(timeout=10)  # a driver that hangs must not keep the process
        if not self._thread.is_alive():
            self.read()
            for source in self._sources:
                source.close()
        self._thread = None

    def __enter__(self) -> Sensors:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self.read()

    def read(self) -> None:
        """All sensors once."""
        with self._lock:
            for source in self._sources:
                source.read(time.monotonic())

    def devices(self) -> list[Device]:
        """What was read so far, the training device first."""
        with self._lock:
            return [source.device() for source in reversed(self._sources)]


def _said(error: Exception) -> str:
    text = str(error).strip() or "no reason given"
    if isinstance(error, ImportError):
        return f"{text}: pip install 'lit-fast[profile]'"
    return f"{type(error).__name__}: {text}"


class _Source:
    """Named sensors of one device, each read by a function of its own until that fails."""

    of = "device"

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.sensors: dict[str, tuple[str, Callable[[], float | None]]] = {}
        self.readings: dict[str, Reading] = {}

    def read(self, now: float) -> None:
        for name in list(self.sensors):
            if name not in self.sensors:  # one before it has ended them all
                continue
            unit, function = self.sensors[name]
            value = self.ask(name, function)
            if value is not None:
                self.add(name, unit, float(value))

    def ask(self, name: str, function: Callable[[], Any]) -> Any:
        """What it returns; None, and a note, where it cannot be asked, now or ever again."""
        try:
            return function()
        except Exception as error:  # NVMLError_NotSupported, _NoPermission, ..., AttributeError of an old package
            return self.refused(name, error)

    def refused(self, name: str, error: Exception) -> None:
        self.notes.append(f"{self.of}: no {name}, {_said(error)}")
        self.sensors.pop(name, None)

    def add(self, name: str, unit: str, value: float) -> None:
        reading = self.readings.get(name)
        if reading is None:
            self.readings[name] = Reading(name, unit, value, value, value, 1)
            return
        reading.count += 1
        reading.mean += (value - reading.mean) / reading.count
        reading.minimum, reading.maximum = min(reading.minimum, value), max(reading.maximum, value)

    def _copied(self) -> list[Reading]:
        return [Reading(**vars(reading)) for reading in self.readings.values()]

    def close(self) -> None: ...


class _Host(_Source):
    of = "CPU"

    def __init__(self, device: torch.device, notes: list[str]) -> None:
        super().__init__(notes)
        import psutil

        process = psutil.Process()
        psutil.cpu_percent(), process.cpu_percent()  # both tell what was since they were last asked

        def frequency() -> float | None:
            now = psutil.cpu_freq()
            return None if now is None or not now.current else float(now.current)

        self.sensors = {
            "cpu utilization": ("% of all cores", psutil.cpu_percent),
            "process cpu": ("% of one core", process.cpu_percent),
            "cpu frequency": ("MHz", frequency),
            "resident memory": ("bytes", lambda: process.memory_info().rss),
        }
        self._first = True

    def read(self, now: float) -> None:
        if self._first:  # percentages of an interval of nearly nothing
            self._first = False
            rates = {name: self.sensors.pop(name) for name in ("cpu utilization", "process cpu")}
            super().read(now)
            self.sensors = {**rates, **self.sensors}
            return
        super().read(now)

    def device(self) -> Device:
        return Device("CPU", self._copied())


class _Nvidia(_Source):
    of = "NVML"

    def __init__(self, device: torch.device, notes: list[str]) -> None:
        super().__init__(notes)
        import pynvml

        nvml: Any = pynvml
        self.nvml = nvml
        nvml.nvmlInit()
        self.handle = handle = nvml_handle(nvml, device)
        name = nvml.nvmlDeviceGetName(handle)
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.sensors = {
            "gpu utilization": ("%", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "sm clock": ("MHz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory clock": ("MHz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power": ("W", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            "temperature": ("C", self._temperature),
            "device memory": ("bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
        }
        self.began = time.monotonic()
        self.lost = False
        self.last: float | None = None  # when the sensors were read before
        self.throttled: dict[str, float] = {}
        self.asked_reasons = True
        self.energy_began: tuple[float, float] | None = None  # (s, J)
        self.energy_now: tuple[float, float] | None = None
        self.has_energy = True
        self.links = self._links()
        self.counters: dict[str, Callable[[], int]] = self._error_counters()
        self.before = {name: self._count(name) for name in list(self.counters)}
        self.errors: dict[str, int] = {}
        self.until_errors = 0  # readings until they are counted again
        self.has_rows = True
        self.gpm: Any = self.ask("GPM counters", self._gpm_samples)

    def ask(self, name: str, function: Callable[[], Any]) -> Any:
        """Nothing at all once the device is lost: one note says so."""
        if self.lost:
            return None
        try:
            return function()
        except Exception as error:
            if type(error).__name__ not in _FATAL:
                return self.refused(name, error)
            after = time.monotonic() - self.began
            self.lost, self.sensors = True, {}
            self.notes.append(f"{self.of}: its sensors end {after:.0f} s after they began, {_said(error)}")
            return None

    def read(self, now: float) -> None:
        if self.lost:
            return
        super().read(now)
        if self.asked_reasons:
            reasons = self.ask("clock-event reasons", self._reasons)
            self.asked_reasons = reasons is not None
            for reason in reasons or ():
                self.throttled[reason] = self.throttled.get(reason, 0.0) + (now - (self.last or now))
        if self.has_energy:
            energy = self.ask("energy", lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3)  # mJ
            self.has_energy = energy is not None
            if energy is not None:
                self.energy_now = (time.monotonic(), energy)
                self.energy_began = self.energy_began or self.energy_now
        if self.gpm is not None and self.last is not None and self.ask("GPM counters", self._read_gpm) is None:
            self.gpm = None
        self.until_errors -= 1
        if self.until_errors < 0:
            self.errors, self.until_errors = self._errors(), ERRORS_EVERY
        self.last = now

    def _temperature(self) -> int:
        nvml = self.nvml
        try:
            return int(nvml.nvmlDeviceGetTemperature(self.handle, nvml.NVML_TEMPERATURE_GPU))
        except (AttributeError, nvml.NVMLError_FunctionNotFound):  # from CUDA 14 on
            return int(nvml.nvmlDeviceGetTemperatureV(self.handle, nvml.NVML_TEMPERATURE_GPU))

    def _reasons(self) -> list[str]:
        """Those that hold at this moment; each is booked for the time since the reading before."""
        nvml = self.nvml
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = (ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self.handle)  # their name before 12.535
        named = {name: [event, event.replace("ClocksEvent", "ClocksThrottle")] for event, name in _REASONS.items()}
        return [name for name, either in named.items() if any(bits & getattr(nvml, each, 0) for each in either)]

    # -- counters of errors, told as what was added in the run; rows remapped as what there are

    def _links(self) -> list[int]:
        active = []
        for link in range(getattr(self.nvml, "NVML_NVLINK_MAX_LINKS", 0)):
            try:
                if self.nvml.nvmlDeviceGetNvLinkState(self.handle, link):
                    active.append(link)
            except self.nvml.NVMLError:  # no such link, or none at all
                break
        return active

    def _error_counters(self) -> dict[str, Callable[[], int]]:
        nvml, handle = self.nvml, self.handle

        def ecc(kind: str) -> Callable[[], int]:
            return lambda: int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind}"), nvml.NVML_VOLATILE_ECC
                )
            )

        def nvlink(kind: str) -> Callable[[], int]:
            counter = getattr(nvml, f"NVML_NVLINK_ERROR_DL_{kind}")
            return lambda: sum(nvml.nvmlDeviceGetNvLinkErrorCounter(handle, link, counter) for link in self.links)

        counters = {"ECC corrected": ecc("CORRECTED"), "ECC uncorrected": ecc("UNCORRECTED")}
        if self.links:
            kinds = {"REPLAY": "replays", "RECOVERY": "recoveries", "CRC_FLIT": "CRC errors"}
            counters |= {f"NVLink {name}": nvlink(kind) for kind, name in kinds.items()}
        return counters

    def _count(self, name: str) -> int | None:
        count: int | None = self.ask(name, self.counters[name])
        if count is None:
            del self.counters[name]
        return count

    def _errors(self) -> dict[str, int]:
        errors = {}
        for name in list(self.counters):
            now, before = self._count(name), self.before[name]
            if now is not None and before is not None:
                errors[name] = now - before
        ask = self.nvml.nvmlDeviceGetRemappedRows
        remapped = self.ask("remapped rows", lambda: ask(self.handle)) if self.has_rows else None
        self.has_rows = remapped is not None
        if remapped is None:
            return self.errors if self.lost else errors
        correctable, uncorrectable, pending, failed = remapped
        rows = {"rows remapped": correctable + uncorrectable, "rows to remap": pending, "row remapping failed": failed}
        return errors | {name: int(count) for name, count in rows.items()}

    # -- GPM: two samples, of which the older is overwritten

    def _gpm_samples(self) -> Any:
        nvml = self.nvml
        if not nvml.nvmlGpmQueryDeviceSupport(self.handle).isSupportedDevice:
            return None  # before Hopper: nothing to note
        samples = [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]
        nvml.nvmlGpmSampleGet(self.handle, samples[1])
        return samples

    def _read_gpm(self) -> bool:
        nvml, (old, new) = self.nvml, self.gpm
        nvml.nvmlGpmSampleGet(self.handle, old)
        self.gpm = [new, old]
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(_GPM)
        asked.sample1, asked.sample2 = new, old
        for index, constant in enumerate(_GPM):
            asked.metrics[index].metricId = getattr(nvml, constant)
        nvml.nvmlGpmMetricsGet(asked)
        for index, name in enumerate(_GPM.values()):
            if asked.metrics[index].nvmlReturn == nvml.NVML_SUCCESS:
                self.add(name, "%", float(asked.metrics[index].value))
        return True

    def device(self) -> Device:
        energy = seconds = None
        if self.energy_began is not None and self.energy_now is not None:
            seconds = self.energy_now[0] - self.energy_began[0]
            energy = self.energy_now[1] - self.energy_began[1]
            if seconds < ENERGY_WINDOW:
                energy = seconds = None
        return Device(self.name, self._copied(), energy, seconds, dict(self.throttled), dict(self.errors))

    def short(self) -> bool:
        """Whether the run was too short for its energy to be told."""
        began, now = self.energy_began, self.energy_now
        return began is not None and now is not None and now[0] - began[0] < ENERGY_WINDOW

    def close(self) -> None:
        if self.lost:
            return
        self.errors = self._errors()
        if self.short():
            self.notes.append(f"NVML: no energy, its counter wants {ENERGY_WINDOW:.0f} s and the run was shorter")
        for sample in self.gpm or ():
            self.ask("release of GPM samples", lambda sample=sample: self.nvml.nvmlGpmSampleFree(sample))  # type: ignore[misc]
        self.ask("orderly end", self.nvml.nvmlShutdown)


def nvml_handle(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of a device of torch's: by UUID, since NVML knows nothing of CUDA_VISIBLE_DEVICES.

    Raises:
        RuntimeError: this torch tells no UUID (before 2.4).
    """
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        raise RuntimeError(f"torch {torch.__version__} tells no UUID of its devices; 2.4 does")
    text = str(uuid)
    names = [text] if text.startswith(("GPU-", "MIG-")) else [f"GPU-{text}", f"MIG-{text}"]
    for name in names[:-1]:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:  # a part of a device (MIG) goes by the other name
            continue
    return nvml.nvmlDeviceGetHandleByUUID(names[-1])
