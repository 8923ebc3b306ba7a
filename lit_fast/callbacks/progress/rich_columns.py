"""Columns made of rich's, for progress bars whose `configure_columns` is overridden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from lit_fast.callbacks.progress.bar_line import Track, count_text, duration, metric_texts, speed_text


class CustomBarColumn(BarColumn):
    """The bar itself."""


class _TrackColumn(ProgressColumn):
    """A text in one style, worked out from the track that a task stands for."""

    def __init__(self, style: Any) -> None:
        self.style = style
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        track = task.fields.get("track")
        return Text(self.text_of_task(task) if track is None else self.text(track), style=self.style)

    def text_of_task(self, task: Task) -> str:
        """For a task that a program added to `RichProgressBar.progress`."""
        return ""

    def text(self, track: Track) -> str:
        raise NotImplementedError


class BatchesProcessedColumn(_TrackColumn):
    """Batches begun, and how many there are."""

    def text_of_task(self, task: Task) -> str:
        return f"{task.completed:.0f}/{'--' if task.total is None else f'{task.total:.0f}'}"

    def text(self, track: Track) -> str:
        return count_text(track)


class CustomTimeColumn(_TrackColumn):
    """Time taken, and time to go."""

    def text(self, track: Track) -> str:
        return f"{duration(track.elapsed)} • {duration(track.remaining)}"


class ProcessingSpeedColumn(_TrackColumn):
    """Batches per second."""

    def text(self, track: Track) -> str:
        return speed_text(track.speed)


class MetricsTextColumn(ProgressColumn):
    """The metrics that `update` was given last, beside the bar of training. `RichProgressBar` has its own.

    Args:
        trainer: the Trainer whose metrics they are.
        style: rich's style of the text.
        text_delimiter, metrics_format: between two metrics; of each number.
    """

    def __init__(self, trainer: Any, style: Any, text_delimiter: str = " ", metrics_format: str = ".3f") -> None:
        self._trainer = trainer
        self._style = style or "none"
        self._text_delimiter = text_delimiter
        self._metrics_format = metrics_format
        self._metrics: dict[str, Any] = {}
        super().__init__(table_column=Column())

    def update(self, metrics: dict[str, Any]) -> None:
        """Show these from now on."""
        self._metrics = metrics

    def render(self, task: Task) -> Text:
        if not self._trainer.training or task.fields.get("track") is None:
            return Text()
        return Text(self._text_delimiter.join(self._generate_metrics_texts()), style=self._style)

    def _generate_metrics_texts(self) -> Iterator[str]:
        yield from metric_texts(self._metrics, self._metrics_format)


class CustomProgress(Progress):
    """The tasks that a bar shows. The bar's own thread draws them, so that starting and stopping is not theirs."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class _MetricsOfTask(ProgressColumn):
    def __init__(self, style: Any) -> None:
        self._style = style or "none"
        super().__init__(table_column=Column())

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("metrics", ""), style=self._style)


def standard_columns(theme: Any) -> list[ProgressColumn]:
    """What `RichProgressBar` shows before its metrics, as columns that may be mixed with others."""
    return [
        TextColumn("[progress.description]{task.description}", style=theme.description or "none"),
        CustomBarColumn(
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        ),
        BatchesProcessedColumn(style=theme.batch_progress),
        CustomTimeColumn(style=theme.time),
        ProcessingSpeedColumn(style=theme.processing_speed),
    ]


class ColumnLines:
    """Writes tracks in columns, the metrics behind them. rich lays them out; it draws nothing itself.

    A column sees a `rich.progress.Task` whose `completed` and `total` are batches, `total` None where it is unknown.
    """

    def __init__(self, columns: list[Any], console: Console, metrics_style: Any) -> None:
        self._console = console
        self.progress = CustomProgress(*columns, _MetricsOfTask(metrics_style), console=console)
        self._tasks: dict[Track, TaskID] = {}

    def task_id(self, track: Track) -> TaskID:
        """The task that stands for a track."""
        with self.progress._lock:  # the bar's thread asks, too
            if track not in self._tasks:
                self._tasks[track] = self.progress.add_task(
                    track.description, total=_total(track), track=track, metrics=""
                )
            return self._tasks[track]

    def lines(self, tracks: list[Track], metrics: str, width: int) -> list[str]:
        """The lines of all tracks, each at most `width` characters wide; `metrics` stand beside the first one."""
        progress = self.progress
        for track in self._tasks.keys() - set(tracks):
            progress.remove_task(self._tasks.pop(track))
        for track in tracks:
            shown = metrics if track is tracks[0] else ""
            progress.update(self.task_id(track), completed=track.completed, total=_total(track), metrics=shown)
        with self._console.capture() as written:
            self._console.print(progress.make_tasks_table(progress.tasks), width=width)
        return [line.rstrip() for line in written.get().splitlines()]


def _total(track: Track) -> float | None:
    return None if track.total == float("inf") else track.total
