"""The progress bar on a pseudo-terminal, in a pipe, and line by line."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import progress_bar_program
import pytest
import rich.live  # noqa: F401  # imported by the drawing thread, a first run would be over before
import torch
from callback_programs import Names, make_module, make_trainer
from callback_standins import StandInTrainer

from lit_fast.callbacks import RichProgressBar
from lit_fast.callbacks.progress import bar_line
from lit_fast.callbacks.progress.bar_line import Look, Track, metric_texts, render, render_plain
from lit_fast.callbacks.progress.live_area import HIDE_CURSOR, SHOW_CURSOR, Above, LiveArea
from lit_fast.callbacks.progress.rich_progress import RichProgressBarTheme

TERMINAL = {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
UNWANTED = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


def run_in_child(ending: str) -> None:
    """The program with fresh standard streams, in a forked child, which ends here."""
    status = 1
    try:
        for name in UNWANTED:
            os.environ.pop(name, None)
        os.environ.update(TERMINAL)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        progress_bar_program.main(ending)
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def read_to_end(file: int) -> str:
    written = b""
    try:
        while chunk := os.read(file, 65536):
            written += chunk
    except OSError:  # a pseudo-terminal on Linux says EIO when the other side has closed
        pass
    os.close(file)
    return written.decode()


def on_a_terminal(ending: str, columns: int = 100) -> str:
    """Everything that the program wrote to a terminal of that width."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        run_in_child(ending)
    text = read_to_end(terminal)
    assert os.waitpid(child, 0)[1] == 0, text
    return text


def in_a_pipe(ending: str) -> str:
    """Everything that the program wrote to standard output, which is a pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
        run_in_child(ending)
    os.close(writer)
    text = read_to_end(reader)
    assert os.waitpid(child, 0)[1] == 0, text
    return text


def screen_of(text: str, columns: int = 100) -> list[str]:
    """What a terminal shows in the end: just the control codes that a live area uses."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|.", text, re.DOTALL):
        if token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b["):
            code, count = token[-1], token[2:-1]
            if code == "A":
                row = max(0, row - int(count or 1))
            elif code == "K":
                rows[row] = rows[row][:column]
            elif code == "J":
                rows[row] = rows[row][:column]
                del rows[row + 1 :]
            else:
                assert code in "mlh", token
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
            column += 1
            assert column <= columns, f"a line is wider than the terminal: {rows[row]}"
    return [row.rstrip() for row in rows]


@pytest.mark.parametrize("ending", ["end", "exception", "interrupt"])
def test_on_a_terminal(ending: str) -> None:
    text = on_a_terminal(ending)
    redraws, seconds = re.search(r"RESULT (\d+) ([\d.]+)", text).groups()  # type: ignore[union-attr]
    assert 5 <= int(redraws) <= 10 * float(seconds) + 3
    assert text.count("\x1b[K") >= int(redraws)
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert text.index(HIDE_CURSOR) < text.index(SHOW_CURSOR) < text.index("RESULT")
    assert "Epoch 0/1" in text and "Validation" in text and "40/40" in text and "it/s" in text

    screen = screen_of(text)
    printed = [line for epoch in range(2) for line in
               (f"printed in epoch {epoch}", "to the other stream", "unfinished ... finished")]  # fmt: skip
    assert screen[:6] == printed
    assert re.fullmatch(r"Epoch 1/1 ━+ 40/40 0:00:0\d • 0:00:00 [\d.]+it/s loss=0.125 lr=1.00e-05", screen[6])
    assert screen[7].startswith("RESULT") and screen[8:] == [""]


def test_in_a_pipe_there_are_plain_lines_and_no_control_codes() -> None:
    text = in_a_pipe("end")
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    printed = [line for line in lines if not line.startswith(("Epoch", "RESULT"))]
    assert printed == [line for epoch in range(2) for line in (f"printed in epoch {epoch}", "unfinished ... finished")]
    assert re.fullmatch(r"Epoch 1/1: 100% 40/40 in 0:00:0\d, [\d.]+it/s, loss=0.125, lr=1.00e-05", lines[-2])
    assert lines[-1].startswith("RESULT 0 ")
    assert len([line for line in lines if line.startswith("Epoch")]) <= 2


def test_a_training_step_never_calls_the_bar() -> None:
    live = RichProgressBar().live_hooks()
    assert not {name for name in live if "batch" in name or "backward" in name or "optimizer" in name}
    assert RichProgressBar.reads_gradients is False


def fake_bar(tmp_path: Path, **kwargs: Any) -> tuple[RichProgressBar, StandInTrainer, io.StringIO]:
    trainer = StandInTrainer(tmp_path, num_training_batches=10, max_epochs=-1)
    trainer._evaluation = SimpleNamespace(batch_idx=-1, dataloader_idx=0)
    file = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": file, "force_terminal": True, "no_color": True}, **kwargs)
    bar.setup(trainer, None, "fit")
    return bar, trainer, file


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen within 20 s"
        time.sleep(0.01)


def test_one_thread_for_all_epochs_and_none_afterwards(tmp_path: Path) -> None:
    bar, trainer, _ = fake_bar(tmp_path)
    before = threading.active_count()
    threads = set()
    bar.on_sanity_check_start(trainer, None)
    for _ in range(3):
        bar.on_train_start(trainer, None)
        bar.on_train_epoch_start(trainer, None)
        bar.on_validation_start(trainer, None)
        bar.on_validation_end(trainer, None)
        threads.add(bar._thread)
        bar.on_train_epoch_end(trainer, None)
    assert len(threads) == 1 and all(thread is not None and thread.daemon for thread in threads)
    bar.teardown(trainer, None, "fit")
    assert threading.active_count() == before
    bar.teardown(trainer, None, "fit")


def test_a_second_run_draws_again(tmp_path: Path) -> None:
    bar, trainer, file = fake_bar(tmp_path)
    for _ in range(2):
        start = bar.redraws
        bar.on_train_start(trainer, None)
        bar.on_train_epoch_start(trainer, None)
        until(lambda start=start: bar.redraws > start)  # type: ignore[misc]
        bar.teardown(trainer, None, "fit")
    assert file.getvalue().count(HIDE_CURSOR) == file.getvalue().count(SHOW_CURSOR) == 2


def test_metrics_that_fail_are_reported_once_and_the_bar_goes_on(tmp_path: Path) -> None:
    class Broken(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            raise KeyError("loss")

    trainer = StandInTrainer(tmp_path)
    file = io.StringIO()
    bar = Broken(console_kwargs={"file": file, "force_terminal": True})
    bar.setup(trainer, None, "fit")
    with pytest.warns(UserWarning, match="get_metrics raised KeyError") as record:
        bar.on_train_start(trainer, None)
        bar.on_train_epoch_start(trainer, None)
        until(lambda: bar.redraws >= 1)
        trainer.fit_loop.epoch_loop.batch_idx = 2
        until(lambda: bar.redraws >= 2)
        bar.teardown(trainer, None, "fit")
    assert len(record) == 1 and "3/4" in file.getvalue()


def test_refresh_rate_zero_or_disable_shows_nothing(tmp_path: Path) -> None:
    bar, trainer, file = fake_bar(tmp_path, refresh_rate=0)
    assert bar.is_disabled
    trainer.run(bar, [{}])
    bar, trainer, file = fake_bar(tmp_path)
    bar.disable()
    trainer.run(bar, [{}])
    assert file.getvalue() == "" and bar._thread is None
    bar.enable()
    assert bar.is_enabled


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_the_other_methods_with_two_loaders(tmp_path: Path, method: str) -> None:
    class Bar(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            assert pl_module is module and trainer.progress_bar_callback is self
            return {"mine": 0.25}

    names = Names("lit_fast.pytorch")
    module = make_module(names)
    loader = module.val_dataloader()
    for step in ("validation_step", "test_step", "predict_step"):
        setattr(type(module), step, lambda self, batch, batch_idx, dataloader_idx=0: None)
    file = io.StringIO()
    bar = Bar(console_kwargs={"file": file, "force_terminal": True, "no_color": True})
    trainer = make_trainer(names, str(tmp_path), callbacks=bar, enable_progress_bar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prediction of None
        getattr(trainer, method)(module, [loader, loader])
    name = {"validate": "Validation", "test": "Testing", "predict": "Predicting"}[method]
    assert re.fullmatch(rf"{name} ━+ 2/2 0:00:0\d • 0:00:00 \S+it/s mine=0.250", screen_of(file.getvalue())[-2])
    plain = io.StringIO()
    trainer = make_trainer(
        names, str(tmp_path), callbacks=Bar(console_kwargs={"file": plain}), enable_progress_bar=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(trainer, method)(module, loader)
    assert re.fullmatch(rf"{name}: 100% 2/2 in 0:00:0\d, \S+it/s, mine=0.250\n", plain.getvalue())


def test_the_theme_shows(tmp_path: Path) -> None:
    theme = RichProgressBarTheme(
        description="red", progress_bar="green", batch_progress="blue", time="cyan", processing_speed="magenta",
        metrics="yellow", metrics_text_delimiter=" / ", metrics_format=".1e",
    )  # fmt: skip
    file = io.StringIO()
    bar = RichProgressBar(
        theme=theme, console_kwargs={"file": file, "force_terminal": True, "color_system": "standard"}
    )
    trainer = StandInTrainer(tmp_path, num_training_batches=10, progress_bar_metrics={"a": 0.5, "b": 2})
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    trainer.fit_loop.epoch_loop.batch_idx = 4
    bar.on_train_epoch_start(trainer, None)
    until(lambda: bar.redraws > 0)
    bar.teardown(trainer, None, "fit")
    text = file.getvalue()
    for part in ("31mEpoch 0/9", "32m━", "34m 5/10", "36m0:00:0", "35m", "33ma=5.0e-01 / b=2"):
        assert f"\x1b[{part}" in text, part


def test_a_debugger_prompt_is_not_overwritten(tmp_path: Path) -> None:
    bar, _, _ = fake_bar(tmp_path)
    bar._watched_thread = threading.get_ident()
    seen: dict[str, Any] = {"__name__": "pdb", "bar": bar}
    exec("import pdb\ninside = bar._debugger_has_the_terminal()", seen)
    assert seen["inside"] is True
    assert bar._debugger_has_the_terminal() is False


# -- one line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(bar_line.time, "monotonic", lambda: now.time)
    return now


def track(clock: SimpleNamespace, completed: int, total: float) -> Track:
    result = Track("Epoch 3/9", total)
    result.observe(0)
    clock.time += 4.0
    result.observe(completed)
    return result


def test_a_line_in_full_and_in_less_and_less_room(clock: SimpleNamespace) -> None:
    running = track(clock, 20, 100)
    metrics = {"loss": torch.tensor(0.1234), "v_num": 3, "lr": 2e-5, "name": "abc"}
    full = render(running, metrics, Look(), 130)
    bar = "━" * 8 + " " * 32
    values = "loss=0.123 v_num=3 lr=2.00e-05 name=abc"
    assert full == f"Epoch 3/9 {bar}  20/100 0:00:04 • 0:00:16 5.00it/s {values}"
    for width in range(1, 131):
        assert len(render(running, metrics, Look(), width)) <= width
    assert render(running, metrics, Look(), 70).endswith("5.00it/s loss=0.123 v_…")
    assert "━" not in render(running, metrics, Look(), 50)


def test_unknown_totals_and_letters(clock: SimpleNamespace) -> None:
    running = track(clock, 20, math.inf)
    line = render(running, {}, Look(unicode=False), 79)
    assert "20/-- 0:00:04 | -:--:-- 5.00it/s" in line and "#" in line and line.isascii()
    assert render_plain(running, {"loss": 0.5}, Look()) == "Epoch 3/9: 20 in 0:00:04, 5.00it/s, loss=0.500"
    nothing = Track("Epoch 0", 0)
    assert "0/0" in render(nothing, {}, Look(), 79)


def test_a_validation_does_not_count_as_training_time(clock: SimpleNamespace) -> None:
    running = track(clock, 20, 100)
    running.pause()
    clock.time += 100
    running.observe(99)  # nobody trains meanwhile
    running.resume()
    assert (running.elapsed, running.completed, running.speed, running.remaining) == (4.0, 20, 5.0, 16.0)
    running.finish(100)
    clock.time += 50
    assert (running.elapsed, running.completed, running.speed) == (4.0, 100, 25.0)


def test_metric_texts() -> None:
    metrics = {"a": 1.0, "b": 1e-7, "c": 0.0, "d": math.nan, "e": 7, "f": {"g": 0.5}, "h": torch.tensor(2)}
    texts = ["a=1.000", "b=1.00e-07", "c=0.000", "d=nan", "e=7", "f/g=0.500", "h=2"]
    assert metric_texts(metrics, ".3f") == texts


# -- the area


def test_a_forked_child_writes_straight_through() -> None:
    stream = io.StringIO()
    area = LiveArea(stream)
    area.start()
    above = Above(area, stream)
    area.draw(["bar"])
    reader, writer = os.pipe()
    with area.lock:  # as the drawing thread may hold it while another thread forks
        child = os.fork()
        if child == 0:
            above.write("x\n")
            os.write(writer, b"ok" if stream.getvalue().endswith("x\n") and not area.open else b"no")
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 2) == b"ok"
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert area.open
    area.stop()


def test_a_closed_terminal_is_no_error() -> None:
    stream = io.StringIO()
    area = LiveArea(stream)
    area.start()
    area.draw(["bar"])
    stream.close()
    area.draw(["next"])
    area.stop()
    assert not area.open
