"""Compilation and garbage collection inside a step are noticed, whenever torch's compiler comes in."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heart_models import Plain, batches, fitted

from lit_fast import ops
from lit_fast.profiler import StepProfiler, interruptions
from lit_fast.profiler.interruptions import COLLECTION, COMPILATION, watch

COMPILES = """
import sys
import torch
from heart_models import Plain, batches, fitted
from lit_fast.profiler import StepProfiler

class AtTheFirstBatch(Plain):
    def configure_optimizers(self):
        assert "torch._dynamo" not in sys.modules  # torch's optimizers import it

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.net = torch.compile(self.net, backend="eager")
        return super().training_step(batch, batch_idx)

class BeforeTheRun(Plain):
    def configure_model(self):
        self.net = torch.compile(self.net, backend="eager")

assert "torch._dynamo" not in sys.modules
for kind in (AtTheFirstBatch, BeforeTheRun, Plain):
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    profiler, paths = StepProfiler(show=False), list(sys.meta_path)
    fitted(kind(), batches(4), max_epochs=1, profiler=profiler)
    assert sys.meta_path == paths
    first = next(slow for slow in profiler._clock.read().slowest if slow.step == 0)
    print(kind.__name__, first.interruptions.get("compilation"), sep="=")
"""


@pytest.mark.slow  # torch's compiler is imported anew
def test_a_module_that_is_compiled_in_the_run() -> None:
    """In a fresh interpreter: the compiler is imported in the middle of a step, or was before."""
    tests = Path(__file__).parents[1]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=around, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=") for line in done.stdout.splitlines() if "=" in line and " " not in line)
    assert int(found["AtTheFirstBatch"]) > 100_000 and int(found["BeforeTheRun"]) > 100_000  # ns
    assert found["Plain"] == "None"


def test_the_compiler_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch._dynamo")]:
        monkeypatch.delitem(sys.modules, name)
    clock, paths = ops.PhaseClock(["all"], (COLLECTION, COMPILATION)), list(sys.meta_path)
    watched = watch(clock)
    assert len(sys.meta_path) == len(paths) + 1
    import colorsys  # any other module is found as always

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
    watched.close()
    assert "torch._dynamo" not in sys.modules and sys.meta_path == paths


COMPILER = """
import time

class Handler:
    def register_start_callback(self, callback): self.begin = callback
    def register_end_callback(self, callback): self.end = callback
    def remove_start_callback(self, callback): self.begin = None
    def remove_end_callback(self, callback): raise ValueError  # gone already

callback_handler = Handler()

def compile():
    callback_handler.begin(1)
    time.sleep(0.002)
    callback_handler.end(1)
"""


def test_a_compiler_that_comes_in_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "compiler_that_comes_in_later"
    (tmp_path / f"{name}.py").write_text(COMPILER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(interruptions, "_COMPILER", name)
    clock, paths = ops.PhaseClock(["all"], (COLLECTION, COMPILATION)), list(sys.meta_path)
    clock.start("all")
    with watch(clock):
        compiler = importlib.import_module(name)
        assert sys.meta_path == paths
        compiler.compile()
    assert compiler.callback_handler.begin is None
    clock.stop()
    assert 2_000_000 <= clock.read().interruptions[COMPILATION] < clock.read().wall


def test_nothing_of_it_is_left_after_a_run() -> None:
    import torch._dynamo.callback as compiler

    handler = compiler.callback_handler
    before = (len(gc.callbacks), len(handler.start_callbacks), len(handler.end_callbacks), len(sys.meta_path))
    fitted(Plain(), batches(2), max_epochs=1, profiler=StepProfiler(show=False))
    after = (len(gc.callbacks), len(handler.start_callbacks), len(handler.end_callbacks), len(sys.meta_path))
    assert before == after


def test_a_compiler_that_forgets_it_is_no_error() -> None:
    class Resets(Plain):
        def on_train_end(self) -> None:
            torch.compiler.reset()

    assert fitted(Resets(), batches(2), max_epochs=1, profiler=StepProfiler(show=False)).global_step == 2


def test_collections_are_timed() -> None:
    clock = ops.PhaseClock(["all"], (COLLECTION, COMPILATION))
    clock.start("all")
    with watch(clock):
        gc.collect()
    gc.collect()
    clock.stop()
    found = clock.read().interruptions
    assert 0 < found[COLLECTION] < clock.read().wall and found[COMPILATION] == 0
