"""`lit-fast watch`: what it shows of a job that runs, and when it ends."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from profiles import profile
from rich.console import Console

from lit_fast.cli import watch as command
from lit_fast.errors import ProfileError
from lit_fast.profiler.files import write
from lit_fast.profiler.merge import path_of
from lit_fast.profiler.report.live import Watch


def running(folder: Path, number: int, steps: int, written: int | None = None, **of_rank_two: float) -> None:
    for rank in range(number if written is None else written):
        made = profile(steps=steps, rank=rank, world_size=number, **(of_rank_two if rank == 2 else {}))
        made.finished = False
        write(made, path_of(folder, rank))


def shown(watch: Watch) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(watch.frame())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_frame_has_speed_phases_and_the_slowest_rank_first(tmp_path: Path) -> None:
    running(tmp_path, 4, 100, forward=6e-3, communication=0.1e-3)
    lines = shown(Watch(tmp_path)).splitlines()
    assert lines[0].split("  ") == ["4 of 4 ranks", "step 100", "98.0 steps/s"]
    phases = {line.split()[0]: line.split()[1:] for line in lines[2:13]}
    assert phases["backward"][:2] == ["5.20", "ms"] and phases["backward"][-1].startswith("####")
    first = lines[next(n for n, line in enumerate(lines) if line.startswith("─")) + 1].split()
    assert first[:2] == ["2", "node-0"] and "s ago" in lines[-1]


def test_the_rate_is_that_of_now(tmp_path: Path) -> None:
    running(tmp_path, 2, 100)
    watch = Watch(tmp_path)
    watch.look()
    for rank in range(2):  # 100 more steps, each of 20 ms
        made = profile(steps=200, rank=rank, world_size=2)
        made.finished, made.wall = False, made.wall / 2 + 2.0
        write(made, path_of(tmp_path, rank))
        os.utime(path_of(tmp_path, rank), (time.time() + 5, time.time() + 5))
    assert "step 200  50.0 steps/s" in shown(watch)


def test_processes_that_are_silent_or_missing(tmp_path: Path) -> None:
    running(tmp_path, 8, 50, written=3)
    os.utime(path_of(tmp_path, 1), (time.time() - 300, time.time() - 300))
    path_of(tmp_path, 0).write_text("{")
    text = shown(Watch(tmp_path))
    assert text.startswith("2 of 8 ranks") and "rank 1 has not written for 300 s" in text and "300 s ago" in text
    assert "is not JSON" in text


def test_a_process_that_was_killed_ends_the_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    made = profile(steps=50)
    made.finished, made.header.host, made.header.pid = False, socket.gethostname(), dead.pid
    write(made, path_of(tmp_path, 0))
    watch = Watch(tmp_path)
    assert "gone" not in shown(watch) and not watch.over, "it has written just now"
    os.utime(path_of(tmp_path, 0), (time.time() - 60, time.time() - 60))
    assert command.main([str(tmp_path)]) == 0
    assert f"rank 0 is gone: process {dead.pid} was killed" in capsys.readouterr().out
    made.header.pid = os.getpid()
    write(made, path_of(tmp_path, 0))
    os.utime(path_of(tmp_path, 0), (time.time() - 60, time.time() - 60))
    assert "has not written for 60" in shown(Watch(tmp_path))


def test_files_of_an_earlier_run_are_not_waited_for(tmp_path: Path) -> None:
    running(tmp_path, 8, 50)
    for rank in range(2):
        made = profile(steps=90, rank=rank, world_size=2)
        made.header.started = "2026-11-21T09:30:00+00:00"
        write(made, path_of(tmp_path, rank))
    watch = Watch(tmp_path)
    text = shown(watch)
    assert text.startswith("2 of 2 ranks  step 90") and watch.over
    assert "Left out: ranks 2, 3, 4, 5, 6, 7 of an earlier run" in text


def test_into_a_pipe_goes_a_line_for_each_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path, 2, 0)
    timers = []
    for after, steps, finished in ((0.3, 10, False), (0.6, 20, True)):
        made = [profile(steps=steps, rank=rank, world_size=2) for rank in range(2)]
        for rank, one in enumerate(made):
            one.finished = finished
            timers.append(threading.Timer(after, write, (one, path_of(tmp_path, rank))))
    for timer in timers:
        timer.start()
    assert command.main([str(tmp_path), "--every", "0.02"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2 of 2")]
    assert lines[0] == "2 of 2 ranks  step 0" and lines[-1].endswith("ended") and "step 20" in lines[-1]
    assert len(lines) <= 8, "not one for each look"


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path_of(tmp_path, 0).touch()
    assert command.main([str(tmp_path), "--once"]) == 1 and "is empty" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal(tmp_path: Path, width: int) -> None:
    running(tmp_path, 4, 100)
    console = Console(file=io.StringIO(), width=width)
    console.print(Watch(tmp_path).frame(width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width and any("backward" in line and "5.20 ms" in line for line in lines)
    assert any(re.match(r" *0 .* 10\.\d", line) for line in lines) and not any("…" in line for line in lines)


def test_of_many_the_slowest(tmp_path: Path) -> None:
    running(tmp_path, 40, 10)
    assert "28 with less work" in shown(Watch(tmp_path))


def test_the_command_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path, 2, 10)
    assert command.main([str(tmp_path), "--once"]) == 0
    assert "2 of 2 ranks  step 10" in capsys.readouterr().out

    def end() -> None:
        for rank in range(2):
            write(profile(steps=30, rank=rank, world_size=2), path_of(tmp_path, rank))

    timer = threading.Timer(0.2, end)
    timer.start()
    assert command.main([str(tmp_path), "--every", "0.05"]) == 0
    timer.join()
    assert "step 30" in capsys.readouterr().out


def test_one_look_at_nothing(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="has no rank-"):
        command.main([str(tmp_path), "--once"])
