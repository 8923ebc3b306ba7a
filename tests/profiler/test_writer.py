"""Files that are written beside a run: a step waits for a small piece of one at most."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from lit_fast.profiler import StepProfiler, files, record, step, writer
from lit_fast.profiler.writer import PeriodicWriter, in_pieces


@pytest.fixture
def full() -> StepProfiler:
    """A profiler with as much to tell as it ever has: many parts, wide histograms, the timeline of 64 steps."""
    profiler = StepProfiler(show=False)
    profiler.start()
    for number in range(500):
        profiler.wrap("checkpoint", int, f"checkpoints/step={number}.ckpt")()
    hooks = [profiler.wrap("hooks", int, f"[Callback]Some.hook_{number}") for number in range(20)]
    work = [profiler.wrap(phase, sum) for phase in record.PHASES[1:9]]
    for number in profiler.wrap_batches(iter(range(1000))):
        for hook in hooks:
            hook()
        for index, function in enumerate(work):
            function(range((index + 1) * number // 4))
    profiler.stop()
    return profiler


def test_no_piece_of_a_file_takes_long(full: StepProfiler, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    began = 0

    def between() -> None:
        nonlocal began
        pieces.append(time.thread_time_ns() - began)  # not what the machine does meanwhile
        began = time.thread_time_ns()

    monkeypatch.setattr(step, "let_others_run", between)
    monkeypatch.setattr(writer, "let_others_run", between)
    longest = []
    gc.collect()
    gc.disable()  # what has been imported for other tests is no object of ours
    try:
        for _ in range(5):
            pieces.clear()
            began = time.thread_time_ns()
            size = 0
            for piece in files.pieces(full.profile()):
                size += len(piece)
                between()
            longest.append(max(pieces))
    finally:
        gc.enable()
    assert size > 150_000 and len(pieces) > 100
    assert min(longest) < 1_000_000


def test_pieces_are_the_whole(full: StepProfiler, tmp_path: Path) -> None:
    profile = full.profile()
    files.write(profile, tmp_path / "file.json")
    assert files.read(tmp_path / "file.json") == profile
    assert (tmp_path / "file.json").read_text() == files.to_json(profile)
    assert in_pieces(str, range(100)) == [str(number) for number in range(100)]


def test_files_are_made_while_a_loop_runs_that_never_waits(full: StepProfiler, tmp_path: Path) -> None:
    written = PeriodicWriter(full.profile, tmp_path / "file.json", every=0.001)
    written.start()
    turns, end = 0, time.monotonic() + 30.0
    while not (tmp_path / "file.json").exists() and time.monotonic() < end:
        turns += 1
    written.end()
    assert turns > 1000 and files.read(tmp_path / "file.json") == full.profile()
