"""A run that was killed, interrupted or stopped goes on with the very losses that it would have had."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import resume_program
import torch
from new_process import NewProcess

import lit_fast

PROGRAM = Path(resume_program.__file__)
WHOLE: dict[str, tuple[dict[tuple[int, int], str], str]] = {}  # uninterrupted runs by their options


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    python, threads = random.getstate(), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_num_threads(threads)


def whole(folder: Path, **options: Any) -> tuple[dict[tuple[int, int], str], str]:
    """Losses and final weights of the run without any interruption."""
    key = json.dumps({k: v for k, v in options.items() if k != "pause"}, sort_keys=True)
    if key not in WHOLE:
        place = folder / "whole"
        place.mkdir()
        with own_random_state():
            resume_program.run(place, resume=False, **{**options, "pause": 0.0})
        WHOLE[key] = resume_program.losses(place), (place / "weights.txt").read_text()
    return WHOLE[key]


class Killed(BaseException):
    """Ends a run as a kill does for everything but the process: no handler of ours looks at it."""


class Hook(lit_fast.Callback):
    """Runs `function(trainer)` in one hook, without asking for gradients that are clipped in place."""

    reads_gradients = False

    def __init__(self, hook: str, function: Any) -> None:
        self.hook, self.function = hook, function

    def live_hooks(self, trainer: Any = None) -> set[str]:
        return {self.hook}

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        self.function(trainer)

    on_train_batch_end = on_validation_batch_start = on_validation_batch_end = on_train_batch_start
    on_train_epoch_start = on_train_epoch_end = on_fit_end = on_train_batch_start
    on_validation_start = on_validation_end = on_train_batch_start


def kill_at(folder: Path, hook: str, number: int, **options: Any) -> None:
    """Run until `hook` has been called `number` times outside of the sanity check, and break off there."""
    calls = 0

    def kill(trainer: Any) -> None:
        nonlocal calls
        calls += not trainer.sanity_checking
        if calls == number:
            raise Killed

    with own_random_state(), contextlib.suppress(Killed):
        resume_program.run(folder, (Hook(hook, kill),), **options)


def finish(folder: Path, **options: Any) -> tuple[dict[tuple[int, int], str], str]:
    with own_random_state():
        resume_program.run(folder, **options)
    return resume_program.losses(folder), (folder / "weights.txt").read_text()


# 44 rows are 11 batches: windows of 2 end with a shorter one; validation after each epoch, or after every 3 batches
# (in the middle of a window too).
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "validation_inside_windows": {"val_every": 3},
    "validation_every_2_epochs": {"val_epochs": 2},
    "across_epochs": {"val_every": 4, "val_epochs": None},
    "noise_drawn_while_loading": {"kind": "noisy"},
    "data_with_a_generator_of_its_own": {"generator": True, "save_on": "epochs"},
    "stream_without_length": {"kind": "stream", "val_every": 3},
    "saved_at_epoch_ends": {"save_on": "epochs"},
    "no_accumulation": {"window": 1, "every": 4},
    "windows_of_4": {"window": 4, "every": 1},
}


POINTS = {"on_train_batch_end": 17, "on_validation_batch_start": 5, "on_train_epoch_end": 2, "on_validation_end": 2}


@pytest.mark.parametrize("hook", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_off_and_resumed(kind: str, hook: str, tmp_path: Path) -> None:
    options = KINDS[kind]
    expected = whole(tmp_path, **options)
    once = kind == "validation_every_2_epochs" and "validation" in hook  # it validates once, 3 batches
    kill_at(tmp_path, hook, 1 if once else POINTS[hook], **options)
    assert not (tmp_path / "weights.txt").exists(), "it was not broken off"
    assert finish(tmp_path, **options) == expected


def test_broken_off_three_times(tmp_path: Path) -> None:
    options = KINDS["validation_inside_windows"]
    expected = whole(tmp_path, **options)
    for number in (8, 6, 7):
        kill_at(tmp_path, "on_train_batch_start", number, **options)
    assert finish(tmp_path, **options) == expected


@pytest.mark.parametrize("kind", ["plain", "validation_inside_windows", "no_accumulation", "stream_without_length"])
@pytest.mark.parametrize("first", [1, 6, 7])
def test_stopped_by_max_steps_and_continued(kind: str, first: int, tmp_path: Path) -> None:
    """`max_steps=n`, then more: as if it had never stopped. 6 is the end of an epoch with windows of 2."""
    options = {**KINDS[kind], "epochs": -1}
    expected = whole(tmp_path, **options, steps=14)
    finish(tmp_path, **options, steps=first)
    assert finish(tmp_path, **options, steps=14) == expected


def test_twice_as_many_steps(tmp_path: Path) -> None:
    options = {"epochs": -1, "every": 5}
    expected = whole(tmp_path, **options, steps=20)
    finish(tmp_path, **options, steps=10)
    assert finish(tmp_path, **options, steps=20) == expected


def test_more_epochs(tmp_path: Path) -> None:
    expected = whole(tmp_path, epochs=4, save_on="epochs")
    finish(tmp_path, epochs=2, save_on="epochs")
    assert finish(tmp_path, epochs=4, save_on="epochs") == expected


def test_saved_inside_a_window(tmp_path: Path) -> None:
    """A checkpoint written by the user's own call, two micro-batches into a window of four."""
    options = {"window": 4, "every": 100}
    expected = whole(tmp_path, **options)

    def save_and_die(trainer: Any) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx == 5:
            trainer.save_checkpoint(tmp_path / "checkpoints" / "inside.ckpt")
            raise Killed

    with own_random_state(), contextlib.suppress(Killed):
        resume_program.run(tmp_path, (Hook("on_train_batch_end", save_and_die),), **options)
    saved = torch.load(tmp_path / "checkpoints" / "inside.ckpt", weights_only=True)
    assert set(saved["lit_fast"]["gradients"]) == set(saved["state_dict"])
    assert saved["lit_fast"]["batch_idx"] == 5
    assert finish(tmp_path, **options) == expected


# -- whole processes: SIGKILL, Ctrl-C, SIGTERM


def start(folder: Path, **options: Any) -> NewProcess:
    environment = {"TMPDIR": str(folder)}  # a killed process cleans nothing up
    return NewProcess(PROGRAM, folder, json.dumps(options), env=environment)


def wait_for_steps(folder: Path, process: NewProcess, steps: int) -> None:
    file = folder / "losses.txt"
    deadline = time.monotonic() + 240  # spawned workers import torch anew, in every epoch
    while not file.exists() or len(file.read_text().splitlines()) < steps:
        assert process.poll() is None, process.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.005)


def run_to_end(folder: Path, **options: Any) -> None:
    process = start(folder, **options).wait()
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 1), (signal.SIGTERM, 143)], ids=["ctrl_c", "sigterm"])
@pytest.mark.parametrize(
    ("workers", "context"),
    [
        pytest.param(0, None, marks=pytest.mark.slow),
        (2, None),
        pytest.param(2, "spawn", marks=pytest.mark.slow),
    ],
)
def test_interrupted(number: int, code: int, workers: int, context: str | None, tmp_path: Path) -> None:
    """A signal goes to the whole process group, loader workers included, as terminals and job schedulers send it."""
    options = {"kind": "noisy", "workers": workers, "every": 100}
    expected = whole(tmp_path, **options)
    options = {**options, "context": context}
    process = start(tmp_path, pause=0.02, **options)
    wait_for_steps(tmp_path, process, 14)
    os.killpg(process.pid, number)
    process.wait(60)
    assert process.returncode == code, process.stderr
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.exists()
    assert str(last) in process.stdout and "ckpt_path" in process.stdout
    assert finish(tmp_path, **options) == expected


@pytest.mark.slow
def test_interrupted_twice_overwrites_its_own_file_only(tmp_path: Path) -> None:
    options = {"every": 100, "epochs": 4}
    expected = whole(tmp_path, **options)
    for steps in (5, 14):
        process = start(tmp_path, pause=0.02, **options)
        wait_for_steps(tmp_path, process, steps)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60).returncode == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt"]
    process = start(tmp_path, pause=0.02, resume=False, **{**options, "sanity": 0})
    wait_for_steps(tmp_path, process, 22)
    os.kill(process.pid, signal.SIGINT)
    process.wait(60)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last-v1.ckpt", "last.ckpt"]  # a run that began anew leaves the other one's file alone
    assert finish(tmp_path, **options) == expected


def test_interrupted_in_the_sanity_check_saves_nothing(tmp_path: Path) -> None:
    def interrupt(trainer: Any) -> None:
        assert trainer.sanity_checking
        os.kill(os.getpid(), signal.SIGINT)

    with own_random_state(), pytest.raises(SystemExit) as stopped:
        resume_program.run(tmp_path, (Hook("on_validation_batch_start", interrupt),))
    assert stopped.value.code == 1
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("hook,number", [("on_train_batch_start", 17), ("on_validation_batch_start", 5)])
@pytest.mark.parametrize("kind", ["plain", "validation_inside_windows", "stream_without_length"])
def test_interrupted_inside(kind: str, hook: str, number: int, tmp_path: Path) -> None:
    """In the middle of a window, of an epoch, of validation: the file holds that very place."""
    options = {**KINDS[kind], "every": 100}
    expected = whole(tmp_path, **options)
    calls = 0

    def interrupt(trainer: Any) -> None:
        nonlocal calls
        calls += not trainer.sanity_checking
        if calls == number:
            os.kill(os.getpid(), signal.SIGINT)

    with own_random_state(), pytest.raises(SystemExit):
        resume_program.run(tmp_path, (Hook(hook, interrupt),), **options)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")] == ["last.ckpt"]
    assert finish(tmp_path, **options) == expected


def test_saved_by_an_exception_inside_a_validation(tmp_path: Path) -> None:
    """The file goes on with that validation from its first batch, and with the random numbers that it began with."""
    options = {**KINDS["validation_inside_windows"], "every": 100}
    expected = whole(tmp_path, **options)

    def save_and_fail(trainer: Any) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == 1:
            raise RuntimeError("on purpose")

    class Rescue(lit_fast.callbacks.OnExceptionCheckpoint):
        reads_gradients = False

    with own_random_state(), pytest.raises(RuntimeError, match="on purpose"):
        hook = Hook("on_validation_batch_end", save_and_fail)
        resume_program.run(tmp_path, (hook, Rescue(tmp_path / "checkpoints")), **options)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")] == ["on_exception.ckpt"]
    assert finish(tmp_path, **options) == expected


def test_interrupt_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with own_random_state(), pytest.raises(SystemExit):
        resume_program.run(tmp_path, (Hook("on_fit_end", lambda trainer: os.kill(os.getpid(), signal.SIGINT)),))
    assert signal.getsignal(signal.SIGINT) is before


def kill_at_random(folder: Path, seed: int, times: int, **options: Any) -> None:
    """Start the run `times` times, each time killed after a random number of further steps, or while saving."""
    chance = random.Random(seed)
    for _ in range(times):
        process = start(folder, pause=0.01, **options)
        file = folder / "losses.txt"
        done = len(file.read_text().splitlines()) if file.exists() else 0
        wait_for_steps(folder, process, done + chance.randint(1, 9))
        time.sleep(chance.random() * 0.03)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def test_killed_at_a_random_moment(tmp_path: Path) -> None:
    options = {"every": 2, "workers": 2, "kind": "noisy", "val_every": 3}
    expected = whole(tmp_path, **options)
    kill_at_random(tmp_path, seed=1, times=1, **options)
    run_to_end(tmp_path, **options)
    assert (resume_program.losses(tmp_path), (tmp_path / "weights.txt").read_text()) == expected
    assert not list((tmp_path / "checkpoints").glob(".*lit-tmp")), "a later save clears what a killed one left"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(kind: str, workers: int, seed: int, tmp_path: Path) -> None:
    options = {**KINDS[kind], "workers": workers, "every": 1}
    expected = whole(tmp_path, **options)
    kill_at_random(tmp_path, seed, times=5, **options)
    run_to_end(tmp_path, **options)
    assert (resume_program.losses(tmp_path), (tmp_path / "weights.txt").read_text()) == expected
