"""Columns made of rich's, for progress bars whose `configure_columns` is overridden."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from lit_fast.callbacks.progress.bar_line import Track, count_text, duration, speed_text


class CustomBarColumn(BarColumn):
    """The bar itself."""


class _TrackColumn(ProgressColumn):
    """A text in one style, worked out from the track that a task stands for."""

    def __init__(self, style: Any) -> None:
        self.style = style
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(self.text(task.fields["track"]), style=self.style)

    def text(self, track: Track) -> str:
        raise NotImplementedError


class BatchesProcessedColumn(_TrackColumn):
    """Batches begun, and how many there are."""

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
        metrics = TextColumn(
            "{task.fields[metrics]}", style=metrics_style or "none", markup=False, table_column=Column()
        )
        self._console = console
        self._progress = Progress(*columns, metrics, console=console)
        self._tasks: dict[Track, TaskID] = {}

    def lines(self, tracks: list[Track], metrics: str, width: int) -> list[str]:
        """The lines of all tracks, each at most `width` characters wide; `metrics` stand beside the first one."""
        progress = self._progress
        for track in self._tasks.keys() - set(tracks):
            progress.remove_task(self._tasks.pop(track))
        for track in tracks:
            total = None if track.total == float("inf") else track.total
            if track not in self._tasks:
                self._tasks[track] = progress.add_task(track.description, total=total, track=track, metrics="")
            shown = metrics if track is tracks[0] else ""
            progress.update(self._tasks[track], completed=track.completed, total=total, metrics=shown)
        with self._console.capture() as written:
            self._console.print(progress.make_tasks_table(progress.tasks), width=width)
        return [line.rstrip() for line in written.get().splitlines()]
