"""The bar drawn by tqdm: what it counts, when it draws, what subclasses may change, and what it costs."""

from __future__ import annotations

import io
import math
import pickle
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_programs import Names, make_module, make_trainer

tqdm_progress = pytest.importorskip("lit_fast.callbacks.progress.tqdm_progress", reason="tqdm is not installed")
Tqdm, TQDMProgressBar = tqdm_progress.Tqdm, tqdm_progress.TQDMProgressBar

NAMES = Names("lit_fast.pytorch")


def fit(tmp_path: Path, bar: Any, method: str = "fit", **options: Any) -> Any:
    module = make_module(NAMES, rows=40)
    trainer = make_trainer(
        NAMES, str(tmp_path), **{"callbacks": bar, "enable_progress_bar": True, "max_epochs": 2, **options}
    )
    getattr(trainer, method)(module)
    return trainer


def test_what_is_shown_of_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"mine": 0.25}

        def init_train_tqdm(self) -> Any:
            bar = super().init_train_tqdm()
            bar.mininterval = 0.0
            return bar

        def init_validation_tqdm(self) -> Any:
            bar = super().init_validation_tqdm()
            seen.append((bar.pos, bar.leave))
            return bar

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            seen.append(self.train_progress_bar.n)

    bar = Bar()
    trainer = fit(tmp_path, bar)
    assert trainer.progress_bar_callback is bar
    assert seen == [*range(1, 11), (-1, False)] * 2  # below the bar of training, and gone afterwards
    out = capsys.readouterr().out
    assert "Epoch 1: 100%" in out and "10/10" in out and "mine=0.250" in out
    assert "Sanity Checking DataLoader 0" in out and "Validation DataLoader 0" in out
    assert bar.train_progress_bar.total == 10


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_the_other_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    module = make_module(NAMES)
    loader = module.val_dataloader()
    type(module).test_step = type(module).validation_step
    type(module).predict_step = lambda self, batch, batch_idx: batch
    bar = TQDMProgressBar()
    trainer = make_trainer(NAMES, str(tmp_path), callbacks=bar, enable_progress_bar=True)
    getattr(trainer, method)(module, loader)
    name = {"validate": "Validation", "test": "Testing", "predict": "Predicting"}[method]
    out = capsys.readouterr().out
    assert f"{name} DataLoader 0: 100%" in out and "2/2" in out


def test_counts_by_refresh_rate_and_draws_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(tqdm_progress.time, "monotonic", lambda: now.time)
    bar = TQDMProgressBar(refresh_rate=3)
    track = SimpleNamespace(n=0, total=8, disable=False, mininterval=0.1)
    drawn = []
    for batches in range(1, 9):
        now.time += 0.025
        drawn.append((bar._counts(track, batches), track.n))
    assert [n for _, n in drawn] == [0, 0, 3, 3, 3, 6, 6, 8]
    assert [draws for draws, _ in drawn] == [False, False, True, False, False, False, False, True]
    track.total = 9
    assert [bar._counts(track, batches) for batches in (6, 9)] == [False, True]  # the last one at once


def test_while_a_validation_runs_the_bar_of_training_is_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tqdm_progress.time, "monotonic", lambda: 100.0)  # nothing is due but the first drawing
    shown = []

    class Look(NAMES("callbacks", "Callback")):  # type: ignore[misc]
        def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
            if not trainer.sanity_checking:
                shown.append(re.findall(r"(\d+)/10 ", capsys.readouterr().out)[-1])

    fit(tmp_path, [TQDMProgressBar(), Look()], val_check_interval=0.3, limit_val_batches=1, max_epochs=1)
    assert shown == ["3", "6", "9"]


def test_a_file_gets_few_drawings_and_a_terminal_many() -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    assert (tqdm_progress._interval(io.StringIO()), tqdm_progress._interval(terminal)) == (5.0, 0.1)
    assert [tqdm_progress.convert_inf(n) for n in (3, math.inf, math.nan, None)] == [3, None, None, None]


def test_bars_of_a_user_that_are_disabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Quiet(TQDMProgressBar):
        def init_validation_tqdm(self) -> Any:
            return Tqdm(disable=True)

        init_sanity_tqdm = init_validation_tqdm

    fit(tmp_path, Quiet())
    out = capsys.readouterr().out
    assert "Epoch 1: 100%" in out and "10/10" in out and "Validation" not in out


def test_a_loader_without_a_length_and_an_early_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands there in the end is where training stopped, however fast it was."""

    class Loader:
        def __iter__(self) -> Any:
            return iter(make_module(NAMES, rows=40).train_dataloader())

    module = make_module(NAMES, rows=40)
    module.train_dataloader = Loader
    bar = TQDMProgressBar()
    make_trainer(NAMES, str(tmp_path), callbacks=bar, enable_progress_bar=True, max_steps=7, max_epochs=3).fit(module)
    assert bar.train_progress_bar.n == 7 and bar.train_progress_bar.total is None
    assert "7/?" in capsys.readouterr().out.split("\r")[-1]


def test_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = TQDMProgressBar(refresh_rate=0)
    assert bar.is_disabled and not [name for name in bar.live_hooks() if "_batch_" in name]
    fit(tmp_path, bar)
    bar = TQDMProgressBar()
    bar.disable()
    assert not bar.is_enabled
    fit(tmp_path, bar)
    assert capsys.readouterr().out == ""
    bar.enable()
    assert bar.is_enabled


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MINITERS", "5")
    assert (TQDMProgressBar().refresh_rate, TQDMProgressBar(refresh_rate=7).refresh_rate) == (5, 7)
    monkeypatch.setenv("COLAB_GPU", "1")
    assert TQDMProgressBar().refresh_rate == 20


def test_bars_before_their_stage_and_pickling(tmp_path: Path) -> None:
    bar = TQDMProgressBar(process_position=2)
    for name in ("train", "val", "test", "predict"):
        with pytest.raises(TypeError, match=f"{name}_progress_bar exists"):
            getattr(bar, f"{name}_progress_bar")
    fit(tmp_path, bar)
    copy = pickle.loads(
        pickle.dumps({k: v for k, v in bar.__getstate__().items() if k != "_trainer" and "log" not in k})
    )
    assert copy["_train_progress_bar"] is None and copy["_process_position"] == 2


def test_print_goes_above_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Talk(NAMES("callbacks", "Callback")):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.print("said", trainer.current_epoch, sep="-")

    fit(tmp_path, [TQDMProgressBar(leave=True), Talk()])
    out = capsys.readouterr().out
    assert "said-0\n" in out and "said-1\n" in out
    TQDMProgressBar().print("no", "bar")
    assert capsys.readouterr().out == "no bar\n"


@pytest.mark.parametrize(
    ("number", "text"), [(21, "21"), (1.0, "1.000"), (0.25, "0.250"), ("12", "12.00"), ("nan", "nan.0"),
                         ("1e-5", "1e-5"), ("ab", "ab"), (123456.0, "1.23e+5")]
)  # fmt: skip
def test_numbers_keep_their_width(number: Any, text: str) -> None:
    assert Tqdm.format_num(number) == text


def test_a_step_pays_little(tmp_path: Path) -> None:
    """The hook of one batch, timed by itself: the bar draws ten times a second, not at every step."""
    bar = TQDMProgressBar()
    trainer = SimpleNamespace(loggers=[], progress_bar_metrics={"loss": 0.5}, max_epochs=1, max_steps=-1, global_step=0,
                              num_training_batches=20_000, is_global_zero=True, current_epoch=0)  # fmt: skip
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    bar.on_train_epoch_start(trainer, None)
    outputs, times = {"loss": torch.tensor(0.5)}, []
    for start in range(0, 20_000, 1000):
        begun = time.perf_counter()
        for batch_idx in range(start, start + 1000):
            bar.on_train_batch_end(trainer, None, outputs, None, batch_idx)
        times.append((time.perf_counter() - begun) / 1000)
    bar.on_train_end(trainer, None)
    assert statistics.median(times) < 5e-6
