"""Columns of users in the progress bar: what they see, what is laid out, and what happens when one fails."""

from __future__ import annotations

import io
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from callback_standins import StandInTrainer
from rich.console import Console
from rich.progress import MofNCompleteColumn, ProgressColumn, TextColumn

from lit_fast.callbacks import RichProgressBar
from lit_fast.callbacks.progress import rich_progress
from lit_fast.callbacks.progress.bar_line import Track
from lit_fast.callbacks.progress.rich_columns import ColumnLines, standard_columns
from lit_fast.callbacks.progress.rich_progress import RichProgressBarTheme


def drawn(tmp_path: Path, bar_class: type[RichProgressBar], **options: Any) -> str:
    """What the bar writes for two epochs, in the first of which a validation runs."""
    file = io.StringIO()
    bar = bar_class(console_kwargs={"file": file, "force_terminal": True, "no_color": True}, **options)
    trainer = StandInTrainer(tmp_path, num_training_batches=10, progress_bar_metrics={"loss": 0.5, "lr": 1e-5})
    trainer._evaluation = SimpleNamespace(batch_idx=0, dataloader_idx=0)
    trainer.loggers = [SimpleNamespace(version=3)]
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    bar.on_train_epoch_start(trainer, None)
    while bar._area is None:
        time.sleep(0.001)
    trainer.fit_loop.epoch_loop.batch_idx = 4
    bar.on_validation_start(trainer, None)
    bar.refresh()
    bar.on_validation_end(trainer, None)
    bar.on_train_epoch_end(trainer, None)
    bar.on_train_end(trainer, None)
    bar.teardown(trainer, None, "fit")
    return uncolored(file.getvalue())


def uncolored(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_columns_of_a_subclass_with_its_metrics_behind_them(tmp_path: Path) -> None:
    asked = []

    class Short(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            asked.append(trainer)
            return [TextColumn("<{task.description}>"), MofNCompleteColumn()]

        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            items = super().get_metrics(trainer, pl_module)
            items.pop("v_num")
            return items

    text = drawn(tmp_path, Short)
    assert "<Epoch 0/9>   5/10 loss=0.500 lr=1.00e-05" in text and "v_num" not in text
    assert "<Validation> 1/2" in text and "it/s" not in text
    assert len(asked) == 1


def test_standard_columns_and_one_more(tmp_path: Path) -> None:
    class More(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            return [*super().configure_columns(trainer), TextColumn("[bold]more")]

    text = drawn(tmp_path, More)
    assert "Epoch 0/9  ━" in text and " 5/10 0:00:0" in text and "it/s more v_num=3" in text


def test_metrics_below_each_other(tmp_path: Path) -> None:
    text = drawn(tmp_path, RichProgressBar, theme=RichProgressBarTheme(metrics_text_delimiter="\n"))
    rows = [row.replace("\x1b[K", "").rstrip() for row in text.splitlines()]
    first = next(index for index, row in enumerate(rows) if row.endswith("v_num=3"))
    assert [row.split()[-1] for row in rows[first : first + 3]] == ["v_num=3", "loss=0.500", "lr=1.00e-05"]


def test_a_column_that_fails_is_reported_and_the_bar_goes_on(tmp_path: Path) -> None:
    class Failing(ProgressColumn):
        def render(self, task: Any) -> str:
            raise KeyError("column")

    class Bar(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            return [Failing()]

    with pytest.warns(UserWarning, match="column of Bar.configure_columns raised KeyError"):
        text = drawn(tmp_path, Bar)
    assert "Epoch 0/9 ━" in text and "5/10" in text


def test_lines_follow_the_tracks_and_fit() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, no_color=True)
    lines = ColumnLines(standard_columns(RichProgressBarTheme()), console, "")
    train, unknown = Track("Epoch 0", 10), Track("Validation", math.inf)
    train.observe(5)
    both = [uncolored(line) for line in lines.lines([train, unknown], "loss=1", 90)]
    assert len(both) == 2 and both[0].endswith("loss=1") and "0/--" in both[1] and "loss" not in both[1]
    assert all(len(uncolored(line)) <= 40 for line in lines.lines([train], "loss=1 " * 20, 40))
    assert len(lines.lines([train], "", 90)) == 1 and console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_task_of_ones_own_beside_the_bar(tmp_path: Path) -> None:
    seen: list[Any] = []

    class More(RichProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            self.games = self.progress.add_task("games", total=7)
            self.progress.update(self.games, advance=3)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            main = self.progress.tasks[self.progress.task_ids.index(self.train_progress_bar_id)]
            seen.append((type(self.progress).__name__, main.description, main.total, self.val_progress_bar.finished))
            super().on_validation_end(trainer, pl_module)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().teardown(trainer, pl_module, stage)
            seen.append(self.progress)

    text = drawn(tmp_path, More)
    assert re.search(r"Epoch 0/9 [^\n]* +5/10 0:00:0[^\n]* v_num=3[^?]*\ngames +━+╸? +3/7", text), text
    assert seen == [("CustomProgress", "Epoch 0/9", 10, False), None]
    assert RichProgressBar().progress is None and RichProgressBar().train_progress_bar_id is None


def test_metrics_in_a_column_of_ones_own() -> None:
    class Quoted(rich_progress.MetricsTextColumn):  # type: ignore[misc, name-defined]
        def _generate_metrics_texts(self) -> Any:
            for text in super()._generate_metrics_texts():
                yield f"<{text}>"

    column = Quoted(SimpleNamespace(training=True), "italic", text_delimiter=", ", metrics_format=".1f")
    column.update({"loss": 0.25, "n": 3})
    assert str(column.render(SimpleNamespace(fields={"track": Track("Epoch 0", 1)}))) == "<loss=0.2>, <n=3>"
    assert str(column.render(SimpleNamespace(fields={}))) == ""


def test_columns_by_the_names_that_programs_import() -> None:
    names = "BatchesProcessedColumn CustomBarColumn CustomTimeColumn MetricsTextColumn ProcessingSpeedColumn"
    for name in names.split():
        assert issubclass(getattr(rich_progress, name), ProgressColumn)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = rich_progress.Nothing
