"""The default progress bar. Its own thread looks at the Trainer and draws; a step never calls it."""

from __future__ import annotations

import atexit
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_fast.callbacks.progress.bar_line import Look, Track, metric_texts, render, render_plain
from lit_fast.callbacks.progress.live_area import LiveArea, columns, is_terminal
from lit_fast.callbacks.progress.progress_bar import ProgressBar, get_standard_metrics

if TYPE_CHECKING:
    from lit_fast.callbacks.progress.rich_columns import ColumnLines, CustomProgress

# More than this per second nobody sees, and a redraw takes 0.25 ms, most of it under the interpreter lock.
MAX_REFRESH_RATE = 10.0
# Without a terminal: seconds between two lines inside an epoch, and at least between the ends of two epochs.
PLAIN_INTERVAL, PLAIN_EPOCH_INTERVAL = 60.0, 1.0

_DEBUGGERS = {"bdb", "pdb", "code"}
_COLUMNS = {
    "BatchesProcessedColumn",
    "CustomBarColumn",
    "CustomProgress",
    "CustomTimeColumn",
    "MetricsTextColumn",
    "ProcessingSpeedColumn",
}


def __getattr__(name: str) -> Any:
    if name not in _COLUMNS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lit_fast.callbacks.progress import rich_columns  # imports rich

    return getattr(rich_columns, name)


@dataclass
class RichProgressBarTheme:
    """Styles of the parts (rich's names and colors), and how metrics are written."""

    description: Any = ""
    progress_bar: Any = "#6206E0"
    progress_bar_finished: Any = "#6206E0"
    progress_bar_pulse: Any = "#6206E0"
    batch_progress: Any = ""
    time: Any = "dim"
    processing_speed: Any = "dim underline"
    metrics: Any = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(ProgressBar):
    """Shows epoch, batches, time, speed and metrics on one line, and a running validation on a second.

    Drawing happens in a daemon thread that reads the Trainer's counters and `get_metrics`; no hook of a
    batch is used, so a step pays nothing for the bar. What is printed meanwhile appears above it. Where the
    output is not a terminal (a pipe, CI), a plain line is written after an epoch (at most one a second) and
    every minute within one. A subclass whose `configure_columns` returns columns of `rich.progress` gets these on the
    terminal, its metrics behind them.

    Args:
        refresh_rate: redraws per second, at most 10; 0 switches the bar off.
        leave: keep the line of every epoch on the screen instead of reusing it.
        theme: styles of the parts.
        console_kwargs: arguments for rich's `Console`, such as `file`, `no_color` or `force_terminal`.

    Attributes:
        redraws: frames written to the terminal so far.

    Example::

        Trainer(callbacks=[RichProgressBar(leave=True)])
    """

    reads_gradients = False

    def __init__(
        self,
        refresh_rate: float = MAX_REFRESH_RATE,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._leave = leave
        self.theme = theme or RichProgressBarTheme()
        self._console_kwargs = console_kwargs or {}
        self.redraws = 0
        self._enabled = True
        self._train: Track | None = None
        self._evaluation: Track | None = None
        self._reset()

    def _reset(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._area: LiveArea | None = None
        self._look: Look | None = None
        self._columns: ColumnLines | None = None
        self._module: Any = None
        self._shown: dict[str, Any] = {}
        self._watched_thread = 0
        self._line_written_at = 0.0
        self._complained = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what draws: a copy in another process draws for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_thread", "_stopped", "_area")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        self.__dict__.update(state)

    # -- switches, as in Lightning

    @property
    def refresh_rate(self) -> float:
        """Redraws per second that were asked for."""
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        """Whether the bar shows anything."""
        return self._enabled and self.refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether the bar shows nothing."""
        return not self.is_enabled

    @property
    def train_progress_bar(self) -> Track | None:
        """The running epoch: `description`, `completed`, `total`, `elapsed`, `speed`."""
        return self._train

    @property
    def val_progress_bar(self) -> Track | None:
        """The running evaluation, where there is one."""
        return self._evaluation

    val_sanity_check_bar = test_progress_bar = val_progress_bar

    @property
    def progress(self) -> CustomProgress | None:
        """The `rich.progress.Progress` of a run, for tasks of one's own and its `console`; None outside of a run.

        Once it was asked for, rich lays the lines out, as it does for columns of one's own.
        """
        columns = self._laid_out()
        return None if columns is None else columns.progress

    @property
    def train_progress_bar_id(self) -> Any:
        """The task of the running epoch in `progress`."""
        return self._task_id(self._train)

    @property
    def val_progress_bar_id(self) -> Any:
        """The task of the running evaluation, where there is one."""
        return self._task_id(self._evaluation)

    val_sanity_progress_bar_id = test_progress_bar_id = predict_progress_bar_id = val_progress_bar_id

    def _task_id(self, track: Track | None) -> Any:
        columns = None if track is None else self._laid_out()
        return None if track is None or columns is None else columns.task_id(track)

    def _laid_out(self) -> ColumnLines | None:
        if self._columns is None and self._thread is not None:
            self._columns = self._column_lines(self.configure_columns(self._trainer))
            for track in (self._train, self._evaluation):  # before tasks that are added now
                if track is not None:
                    self._columns.task_id(track)
        return self._columns

    def _column_lines(self, columns: list[Any]) -> ColumnLines:
        from rich.console import Console

        from lit_fast.callbacks.progress.rich_columns import ColumnLines

        return ColumnLines(columns, Console(**self._console_kwargs), self.theme.metrics)

    def disable(self) -> None:
        self._enabled = False
        self._stop()

    def enable(self) -> None:
        self._enabled = True

    def refresh(self, hard: bool = False) -> None:
        """Draw now, without waiting for the thread."""
        self._redraw()

    def configure_columns(self, trainer: Any) -> list[Any]:
        """The columns of a line, but for the metrics. Override it to show others; called when a run begins.

        Example::

            class Short(RichProgressBar):
                def configure_columns(self, trainer):
                    return [TextColumn("{task.description}"), MofNCompleteColumn()]
        """
        from lit_fast.callbacks.progress.rich_columns import standard_columns

        return standard_columns(self.theme)

    # -- hooks: beginnings and ends only, never a batch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.is_disabled:
            return
        if self._train is not None:
            self._show_finished_epoch(last=False)
        if self._area is not None:
            self._area.finish_line()
        self._train = Track(self._get_train_description(trainer.current_epoch), self.total_train_batches)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._train is not None:
            self._train.finish(trainer.fit_loop.epoch_loop.batch_idx + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._train is not None:
            self._train.finish(trainer.fit_loop.epoch_loop.batch_idx + 1)
            self._show_finished_epoch(last=True)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_evaluation(keep=False)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module)
        sanity = trainer.sanity_checking
        self._begin_evaluation(self.sanity_check_description if sanity else self.validation_description)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_evaluation(keep=trainer.state.fn != "fit")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module)
        self._begin_evaluation(self.test_description)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_evaluation(keep=True)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer, pl_module)
        self._begin_evaluation(self.predict_description)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_evaluation(keep=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._draw(self._shown)  # what stays on the screen; asking for metrics anew might wait for a lost device
        self._stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._stop()

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"Epoch {current_epoch}" + (f"/{last - 1}" if last is not None and last > 0 else "")

    # -- the thread

    def _start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to draw; the thread lives until the run ends, over all its epochs."""
        if self.is_disabled or self._thread is not None:
            return
        self._trainer, self._module = trainer, pl_module
        get_standard_metrics(trainer)  # a logger settles its version here, not in two threads at once
        overridden = type(self).configure_columns is not RichProgressBar.configure_columns
        if overridden or "\n" in self.theme.metrics_text_delimiter:  # a cell of several lines is rich's to lay out
            self._columns = self._column_lines(self.configure_columns(trainer))
        self._watched_thread = threading.get_ident()
        self._line_written_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lit_fast progress bar", daemon=True)
        atexit.register(self._stop)
        self._thread.start()

    def _stop(self) -> None:
        thread, area = self._thread, self._area
        self._stopped.set()
        if thread is not None and thread is not threading.current_thread():
            # a metric on a device that hangs may hold the thread; it finds the area closed when it comes back
            thread.join(timeout=2.0)
        area = self._area or area
        if area is not None:
            area.stop()
        atexit.unregister(self._stop)
        self._train = self._evaluation = None
        self._reset()

    def _run(self) -> None:
        stopped = self._stopped
        area, self._look = self._open()
        if area is None:
            while not stopped.wait(1.0):
                if time.monotonic() - self._line_written_at >= PLAIN_INTERVAL:
                    self._write_line(self._evaluation or self._train)
            return
        with area.lock:
            if stopped.is_set():
                return
            self._area = area
            area.start()
        interval = 1.0 / min(self._refresh_rate, MAX_REFRESH_RATE)
        while not stopped.is_set():
            if self._debugger_has_the_terminal():
                area.clear()
            else:
                self._redraw()
            stopped.wait(interval)

    def _open(self) -> tuple[LiveArea | None, Look]:
        """Ask rich what the terminal can do. None for the area: there is no terminal."""
        from rich.color import ColorSystem
        from rich.console import Console
        from rich.style import Style

        console = Console(**self._console_kwargs)
        theme, stream = self.theme, console.file
        look = Look(delimiter=theme.metrics_text_delimiter, metrics_format=theme.metrics_format)
        forced = self._console_kwargs.get("force_terminal")
        terminal = is_terminal(stream) if forced is None else bool(forced)
        if not terminal or console.legacy_windows:
            return None, look
        look.unicode = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
        if console.color_system is not None and not console.no_color:
            name = {"256": "EIGHT_BIT"}.get(console.color_system, console.color_system.upper())
            styles = {
                "description": theme.description,
                "bar": theme.progress_bar,
                "bar_finished": theme.progress_bar_finished,
                "bar_pulse": theme.progress_bar_pulse,
                "bar_back": "grey23",
                "batch_progress": theme.batch_progress,
                "time": theme.time,
                "processing_speed": theme.processing_speed,
                "metrics": theme.metrics,
            }
            for part, style in styles.items():
                parsed = Style.parse(style) if isinstance(style, str) else style
                before, _, after = parsed.render("x", color_system=ColorSystem[name]).partition("x")
                look.codes[part] = (before, after)
        return LiveArea(stream), look

    def _redraw(self) -> None:
        if self._area is not None:
            self._draw(self._metrics() if self._train is not None or self._evaluation is not None else {})

    def _draw(self, metrics: dict[str, Any]) -> None:
        area, look = self._area, self._look
        if area is None or look is None:
            return
        self._shown = metrics
        tracks = [track for track in self._observe() if track is not None]
        width = columns(area.stream) - 1  # the last column would wrap on some terminals
        lines = self._lines_in_columns(tracks, metrics, look, width)
        if lines is None:
            lines = [render(track, metrics if track is tracks[0] else {}, look, width) for track in tracks]
        if area.draw(lines):
            self.redraws += 1

    def _lines_in_columns(
        self, tracks: list[Track], metrics: dict[str, Any], look: Look, width: int
    ) -> list[str] | None:
        if self._columns is None:
            return None
        try:
            values = look.delimiter.join(metric_texts(metrics, look.metrics_format))
            return self._columns.lines(tracks, values, width)
        except Exception as error:
            self._columns = None
            self._complain(
                "The progress bar goes on with its own columns",
                f"a column of {type(self).__name__}.configure_columns",
                error,
            )
            return None

    def _observe(self) -> tuple[Track | None, Track | None]:
        train, evaluation, trainer = self._train, self._evaluation, self._trainer
        if train is not None:
            train.observe(trainer.fit_loop.epoch_loop.batch_idx + 1)
        if evaluation is not None and not evaluation.finished:
            loop = trainer._evaluation
            if self.has_dataloader_changed(getattr(loop, "dataloader_idx", 0)):
                evaluation.total = self._evaluation_total()
            evaluation.observe(int(min(loop.batch_idx + 1, evaluation.total)))
        return train, evaluation

    def _metrics(self) -> dict[str, Any]:
        try:
            return self.get_metrics(self._trainer, self._module)
        except RuntimeError as error:
            if "changed size" in str(error):  # a new name was logged just now; the next frame has it
                return {}
            self._complain("The progress bar shows no metrics", f"{type(self).__name__}.get_metrics", error)
        except Exception as error:
            self._complain("The progress bar shows no metrics", f"{type(self).__name__}.get_metrics", error)
        return {}

    def _complain(self, outcome: str, source: str, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            warnings.warn(
                f"{outcome}: {source} raised {type(error).__name__}: {error}",
                stacklevel=2,
            )

    def _debugger_has_the_terminal(self) -> bool:
        """Whether the thread that trains stands at a debugger's prompt, which a redraw would write over."""
        if not _DEBUGGERS & sys.modules.keys():
            return False
        frame = sys._current_frames().get(self._watched_thread)
        for _ in range(12):
            if frame is None:
                return False
            if frame.f_globals.get("__name__") in _DEBUGGERS:
                return True
            frame = frame.f_back
        return False

    # -- beginnings and ends, on the thread that trains

    def _begin_evaluation(self, description: str) -> None:
        if self.is_disabled:
            return
        if self._train is not None:
            self._train.observe(self._trainer.fit_loop.epoch_loop.batch_idx + 1)
            self._train.pause()
        self.reset_dataloader_idx_tracker()
        self.has_dataloader_changed(0)
        self._evaluation = Track(description, self._evaluation_total())

    def _evaluation_total(self) -> int | float:
        stage = getattr(self._trainer.state, "stage", "validate")
        if stage == "test":
            return self.total_test_batches_current_dataloader
        if stage == "predict":
            return self.total_predict_batches_current_dataloader
        return self.total_val_batches_current_dataloader

    def _end_evaluation(self, keep: bool) -> None:
        evaluation = self._evaluation
        if evaluation is not None and keep:
            evaluation.finish(int(min(self._trainer._evaluation.batch_idx + 1, evaluation.total)))
            self._show(evaluation)
        self._evaluation = None if not keep else evaluation
        self.reset_dataloader_idx_tracker()
        if self._train is not None:
            self._train.resume()

    def _show_finished_epoch(self, last: bool) -> None:
        """Show the end of an epoch, whose last metrics are known only after its last hook."""
        if self._area is not None:
            if last or self._leave:
                self._redraw()
            if self._leave and not last:
                self._area.commit()
        elif last or time.monotonic() - self._line_written_at >= PLAIN_EPOCH_INTERVAL:
            self._write_line(self._train)

    def _show(self, track: Track) -> None:
        if self._area is not None:
            self._redraw()
        else:
            self._write_line(track)

    def _write_line(self, track: Track | None) -> None:
        if track is None or self._thread is None or self._area is not None:
            return
        self._observe()
        self._line_written_at = time.monotonic()
        stream = self._console_kwargs.get("file") or (sys.stderr if self._console_kwargs.get("stderr") else sys.stdout)
        try:
            print(render_plain(track, self._metrics(), self._look or Look()), file=stream, flush=True)
        except (OSError, ValueError):  # the reader of the pipe went away: nobody is left to tell
            self._stopped.set()
