"""Figures of a run that goes on: asked for at a Prometheus port, sent to a collector, and what goes wrong."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from heart_models import Plain, batches, fitted
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

import lit_fast
from lit_fast.errors import MisconfigurationException, ProfileError
from lit_fast.profiler import DeepProfiler, StepProfiler, ceilings, record
from lit_fast.profiler import export as room


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EVERY", 0.02)
    monkeypatch.setattr(ceilings, "_measured", lambda *_: record.Ceilings())  # test_ceilings.py measures them


class AsksInside(lit_fast.Callback):
    """What somebody else sees while the run goes on."""

    def __init__(self, port: int) -> None:
        self.port, self.text = port, ""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (0, 6):
            time.sleep(0.03)
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
                self.text = answer.read().decode()


def test_prometheus_is_answered_while_the_run_goes_on(port: int) -> None:
    asks = AsksInside(port)
    profiler = DeepProfiler(export=f"prometheus://127.0.0.1:{port}", skip=1, window=1)
    fitted(Plain(), batches(8), max_epochs=1, profiler=profiler, callbacks=[asks])
    rows = dict(line.rsplit(" ", 1) for line in asks.text.splitlines() if not line.startswith("#"))
    labels = f'host="{socket.gethostname()}"'
    steps = next(float(value) for name, value in rows.items() if name.startswith("lit_fast_steps_total"))
    assert steps == 3.0  # of six that had ended, three were looked at closer
    phases = {name: float(value) for name, value in rows.items() if name.startswith("lit_fast_phase_seconds_total")}
    assert any('phase="forward"' in name and labels in name and 'rank="0"' in name for name in phases)
    assert all(value >= 0 for value in phases.values())
    assert any('sensor="resident memory"' in name for name in rows)
    quantiles = [float(value) for name, value in rows.items() if name.startswith("lit_fast_step_seconds{")]
    assert len(quantiles) == 3 and quantiles == sorted(quantiles)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1)  # the run is over


def test_a_port_in_use_is_an_error_at_the_start(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        model = Plain()
        with pytest.raises(ProfileError, match=f"port {port} of 127.0.0.1 cannot be listened at"):
            fitted(model, batches(2), max_epochs=1, profiler=StepProfiler(export=f"prometheus://127.0.0.1:{port}"))
        assert model.losses == []


def test_a_file_for_the_textfile_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EVERY_FILE", 0.01)
    path = tmp_path / "made" / "lit_fast-00000.prom"

    class Looks(lit_fast.Callback):
        seen: list[str] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            time.sleep(0.04)
            self.seen.append(path.read_text())

    profiler = StepProfiler(export=f"file://{tmp_path}/made/lit_fast.prom")
    fitted(Plain(), batches(8), max_epochs=1, profiler=profiler, callbacks=[Looks()])
    assert [one.name for one in path.parent.iterdir()] == [path.name], "written beside it, and put in its place"
    assert len(set(Looks.seen)) > 2 and all(text.endswith("\n") for text in Looks.seen)
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("lit_fast_steps_total{")]
    assert line.endswith(" 8.0") and 'rank="0"' in line, "the last figures stay"


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match=r"lit_fast-00000\.prom cannot be written"):
        fitted(Plain(), batches(2), max_epochs=1, profiler=StepProfiler(export=f"file://{tmp_path}/file/lit_fast.prom"))
    monkeypatch.setattr(room, "EVERY_FILE", 0.01)

    class Takes(lit_fast.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            shutil.rmtree(tmp_path / "gone", ignore_errors=True)
            time.sleep(0.05)

    with pytest.warns(RuntimeWarning, match="could not be written .* the run goes on"):
        fitted(Plain(), batches(2), max_epochs=1, callbacks=[Takes()],
               profiler=StepProfiler(export=f"file://{tmp_path}/gone/lit_fast.prom"))  # fmt: skip


class Collector(BaseHTTPRequestHandler):
    received: list[ExportMetricsServiceRequest]

    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append(ExportMetricsServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    Collector.received = []
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_collector_is_sent_the_last_figures_too(collector: HTTPServer) -> None:
    profiler = StepProfiler(export=f"otlp://127.0.0.1:{collector.server_port}")
    fitted(Plain(), batches(8), max_epochs=1, profiler=profiler)
    found = {
        metric.name: metric
        for resource in Collector.received[-1].resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    (steps,) = found["lit_fast_steps"].sum.data_points
    assert steps.as_int == 8 or steps.as_double == 8.0
    assert found["lit_fast_steps"].sum.is_monotonic
    by_phase = {
        attribute.value.string_value: point.as_double
        for point in found["lit_fast_phase_seconds"].sum.data_points
        for attribute in point.attributes
        if attribute.key == "phase"
    }
    assert by_phase["forward"] == pytest.approx(profiler.phases()["forward"], rel=0.01)
    (samples,) = found["lit_fast_samples"].sum.data_points
    assert samples.as_double == 8 * 4


def test_a_collector_that_is_gone_is_warned_of_once(port: int) -> None:
    model = Plain()
    with pytest.warns(RuntimeWarning, match="could not be exported") as said:
        fitted(model, batches(3), max_epochs=30, profiler=StepProfiler(export=f"otlp://127.0.0.1:{port}"))
    assert len(model.losses) == 90
    assert sum("could not be exported" in str(warning.message) for warning in said) == 1


@pytest.mark.parametrize(
    "wrong", ["", ":9400", "http://host:1", "prometheus://:x", "prometheus://host", "otlp://:4318", "file:///tmp/x"]
)
def test_what_is_no_address(wrong: str) -> None:
    with pytest.raises(MisconfigurationException, match="is no address; allowed are 'prometheus://HOST:PORT'"):
        StepProfiler(export=wrong)


@pytest.mark.parametrize("package", ["prometheus", "otlp"])
def test_a_missing_package_is_an_error_that_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with pytest.raises(ProfileError, match=r"pip install 'lit-fast\[metrics-export\]'"):
        fitted(Plain(), batches(2), max_epochs=1, profiler=StepProfiler(export=f"{package}://127.0.0.1:1"))
