"""Figures of a run that goes on, for Prometheus or an OpenTelemetry collector.

| name | kind | labels | |
|---|---|---|---|
| `lit_fast_steps_total` | counter | | steps that have ended; a step is one batch |
| `lit_fast_samples_total` | counter | | samples in them, where a batch tells how many it has |
| `lit_fast_phase_seconds_total` | counter | `phase` | the rows of a profile |
| `lit_fast_step_seconds` | gauge | `quantile` | duration of a step: 0.5, 0.9, 0.99 of the run so far |
| `lit_fast_steps_per_second` | gauge | | between the last two readings |
| `lit_fast_sensor` | gauge | `device`, `sensor`, `unit` | mean of the run so far; with `profiler="deep"` |

All of them carry `rank` and `host`. They are read from the clock by a thread of the exporter's, at most once a second;
no step runs a line for them.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

from lit_fast.errors import MisconfigurationException, ProfileError
from lit_fast.profiler.record import Device, Distribution

if TYPE_CHECKING:
    from lit_fast.ops import Reading

EVERY, EVERY_FILE = 1.0, 5.0  # s between two readings, and between two files of them
QUANTILES = (0.5, 0.9, 0.99)
_HOW = (
    "allowed are 'prometheus://HOST:PORT' (an empty HOST: every interface), 'otlp://HOST:PORT' (HTTP, as 4318), and "
    "'file:///PATH.prom' for node_exporter's textfile collector"
)


class Metric(NamedTuple):
    """One family of figures: its values by their labels."""

    name: str  # counters without "_total"
    kind: str  # "counter" or "gauge"
    text: str
    values: list[tuple[dict[str, str], float]]


class Exporter(Protocol):
    def stop(self) -> None: ...


class Source:
    """Reads a running profiler, at most once a second however often it is asked, from any thread.

    Args:
        read: what the clock has recorded.
        devices: sensors.
        samples: of a batch; None where it does not tell.
        labels: of every figure.
    """

    def __init__(
        self,
        read: Callable[[], Reading],
        devices: Callable[[], list[Device]],
        samples: Callable[[], float | None],
        labels: dict[str, str],
    ) -> None:
        self._read, self._devices, self._samples, self.labels = read, devices, samples, labels
        self._lock = threading.Lock()
        self._at, self._due = time.monotonic(), float("-inf")  # of the last reading, and when the next may be
        self._steps = 0
        self._kept: list[Metric] = []

    def metrics(self) -> list[Metric]:
        with self._lock:
            now = time.monotonic()
            if now >= self._due:
                self._kept, self._due = self._made(now), now + EVERY
            return self._kept

    def expire(self) -> None:
        """Who asks next is told what is, not what was."""
        with self._lock:
            self._due = float("-inf")

    def _made(self, now: float) -> list[Metric]:
        reading, labels = self._read(), self.labels
        count, passed = reading.steps.count, max(now - self._at, 1e-9)
        spread = Distribution(
            count,
            reading.steps.total * 1e-9,
            reading.steps.minimum * 1e-9,
            reading.steps.maximum * 1e-9,
            reading.steps.buckets,
        )
        rate = (count - self._steps) / passed
        self._at, self._steps = now, count
        phases = [({**labels, "phase": name}, ns * 1e-9) for name, (ns, calls) in reading.phases.items() if calls or ns]
        quantiles = [({**labels, "quantile": str(q)}, spread.quantile(q)) for q in QUANTILES] if count else []
        sensors = [
            ({**labels, "device": device.name, "sensor": sensor.name, "unit": sensor.unit}, sensor.mean)
            for device in self._devices()
            for sensor in device.readings
        ]
        samples = self._samples()
        return [
            Metric("lit_fast_steps", "counter", "Steps that have ended.", [(labels, count)]),
            Metric("lit_fast_phase_seconds", "counter", "Wall time by phase.", phases),
            Metric("lit_fast_step_seconds", "gauge", "Duration of a step, of the run so far.", quantiles),
            Metric("lit_fast_steps_per_second", "gauge", "Between the last two readings.", [(labels, rate)]),
            Metric("lit_fast_sensor", "gauge", "Mean of a sensor in the run so far.", sensors),
            Metric(
                "lit_fast_samples",
                "counter",
                "Samples in the steps that have ended.",
                [] if samples is None else [(labels, count * samples)],
            ),
        ]


def check(url: str) -> SplitResult:
    """The parts of what `export=` was given.

    Raises:
        MisconfigurationException: it is no address that figures can be exported to.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "file":
            known = parts.path.endswith(".prom")
        else:
            known = parts.scheme in _KINDS and parts.port is not None and bool(parts.hostname or parts.scheme != "otlp")
    except ValueError:  # a port that is no number
        known = False
    if not known:
        raise MisconfigurationException(f"export={url!r} is no address; {_HOW}.")
    return parts


def start(url: str, source: Source, local_rank: int = 0) -> Exporter:
    """Begin to export to `url`.

    Args:
        local_rank: added to Prometheus's port: each process of a machine has its own.

    Raises:
        MisconfigurationException: the address is none.
        ProfileError: a package is missing, the port cannot be listened at, or the file not be written.
    """
    parts = check(url)
    try:
        return _KINDS[parts.scheme](parts, source, local_rank)
    except ImportError as error:
        raise ProfileError(
            f"export={url!r} needs a package: {error}. pip install 'lit-fast[metrics-export]'."
        ) from error


def _registry(source: Source) -> Any:
    """What Prometheus's package collects from."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    families = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}

    class Collector:
        def collect(self) -> Iterable[Any]:
            for metric in source.metrics():
                if metric.values:
                    family = families[metric.kind](metric.name, metric.text, labels=list(metric.values[0][0]))
                    for labels, value in metric.values:
                        family.add_metric(list(labels.values()), value)
                    yield family

    registry = CollectorRegistry()
    registry.register(Collector())
    return registry


class _Prometheus:
    """Answers at a port, by the package's own server; figures are read when somebody asks."""

    def __init__(self, parts: SplitResult, source: Source, local_rank: int) -> None:
        from prometheus_client import start_http_server

        registry = _registry(source)
        port = (parts.port or 0) + local_rank
        host = parts.hostname or "0.0.0.0"
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ProfileError(
                f"export='prometheus://{parts.netloc}': port {port} of {host} cannot be listened at: {error.strerror}. "
                f"Process n of a machine takes the given port + n; give another one."
            ) from error

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _TextFile:
    """Writes a file of Prometheus's text, whole or not at all, every few seconds; the last figures stay in it."""

    def __init__(self, parts: SplitResult, source: Source, local_rank: int) -> None:
        from prometheus_client import write_to_textfile

        path = Path(parts.netloc + parts.path)
        self._path = path.with_name(f"{path.stem}-{int(source.labels['rank']):05d}.prom")
        self._source, registry = source, _registry(source)
        self._write: Callable[[], object] = partial(write_to_textfile, str(self._path), registry)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise ProfileError(
                f"export='{parts.geturl()}': {self._path} cannot be written: {error.strerror}. Each process writes a "
                f"file with its rank in its name; give a folder that it may write to."
            ) from error
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lit_fast metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        warned = False
        while not self._ended.wait(EVERY_FILE):
            try:
                self._write()
            except OSError as error:
                if not warned:
                    warned = True
                    warnings.warn(
                        f"Figures could not be written to {self._path}: {error.strerror}; the run goes on, and so do "
                        f"the attempts.",
                        RuntimeWarning,
                        stacklevel=2,
                    )

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._source.expire()
        with suppress(OSError):  # it was warned of
            self._write()


class _OTLP:
    """Pushes once a second, from a thread of the package's."""

    def __init__(self, parts: SplitResult, source: Source, local_rank: int) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.metrics import Observation
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        endpoint = f"http://{parts.netloc}/v1/metrics"
        warned, self._source = threading.Event(), source

        class WarnsOnce(OTLPMetricExporter):
            def export(self, *args: Any, **kwargs: Any) -> Any:
                result = super().export(*args, **kwargs)
                if result is not MetricExportResult.SUCCESS and not warned.is_set():
                    warned.set()
                    warnings.warn(
                        f"Figures could not be exported to {endpoint}; the run goes on, and so do the attempts.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                return result

        # The package logs every attempt that fails.
        self._logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http.metric_exporter")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)
        exporter = WarnsOnce(endpoint=endpoint, timeout=1.0)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=EVERY * 1e3)
        resource = Resource.create({"service.name": "lit_fast"})
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("lit_fast")

        def observe(name: str) -> Callable[[Any], list[Any]]:
            def values(options: Any) -> list[Any]:
                found = next(metric for metric in source.metrics() if metric.name == name)
                return [Observation(value, labels) for labels, value in found.values]

            return values

        for metric in source.metrics():
            create = meter.create_observable_counter if metric.kind == "counter" else meter.create_observable_gauge
            create(metric.name, [observe(metric.name)], description=metric.text)

    def stop(self) -> None:
        self._source.expire()
        self._provider.shutdown(timeout_millis=3000)
        self._logger.setLevel(self._level)


_KINDS: dict[str, Callable[[SplitResult, Source, int], Exporter]] = {
    "prometheus": _Prometheus,
    "otlp": _OTLP,
    "file": _TextFile,
}
