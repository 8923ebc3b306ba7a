"""One bar as one line of text: a track that knows how far it is, and the styles to write it in."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

# Observations over which the speed is taken; at ten a second, five seconds.
_SPEED_WINDOW = 50
_MIN_BAR, _MAX_BAR = 10, 40


class Track:
    """How far one loop is: counted by whoever looks, never by the loop.

    Attributes:
        total: batches there are; `inf` where unknown.
        completed: batches begun.
        finished: no longer observed; `completed` stands.
    """

    def __init__(self, description: str, total: float) -> None:
        self.description = description
        self.total = total
        self.completed = 0
        self.finished = False
        self._begun = time.monotonic()
        self._paused_at: float | None = None
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SPEED_WINDOW)

    def observe(self, completed: int) -> None:
        """Note how many batches were begun by now."""
        if self.finished or self._paused_at is not None:
            return
        if completed < self.completed:
            self._seen.clear()
        self.completed = completed
        self._seen.append((self.elapsed, completed))

    def finish(self, completed: int) -> None:
        """Observe a last time and stop the clock."""
        self.observe(completed)
        self.pause()
        self.finished = True

    def pause(self) -> None:
        """Stop the clock: another loop runs."""
        if self._paused_at is None:
            self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused_at is not None and not self.finished:
            self._begun += time.monotonic() - self._paused_at
            self._paused_at = None

    @property
    def elapsed(self) -> float:
        """Seconds since the start, pauses left out."""
        return (time.monotonic() if self._paused_at is None else self._paused_at) - self._begun

    @property
    def speed(self) -> float | None:
        """Batches per second: of the last seconds, of a finished track over all; None if unknown yet."""
        seconds, batches = self.elapsed, self.completed
        if not self.finished and len(self._seen) > 1:
            (first, before), (last, after) = self._seen[0], self._seen[-1]
            seconds, batches = last - first, after - before
        return batches / seconds if seconds > 0 and batches > 0 else None

    @property
    def remaining(self) -> float | None:
        """Seconds to go at that speed; None where speed or total is unknown."""
        speed = self.speed
        if speed is None or not math.isfinite(self.total):
            return None
        return max(0.0, self.total - self.completed) / speed


@dataclass
class Look:
    """How lines are written: control codes around each part (none without colors), and letters."""

    codes: dict[str, tuple[str, str]] = field(default_factory=dict)
    unicode: bool = True
    delimiter: str = " "
    metrics_format: str = ".3f"

    def styled(self, part: str, text: str) -> str:
        before, after = self.codes.get(part, ("", ""))
        return f"{before}{text}{after}" if text else text


def render(track: Track, metrics: dict[str, Any], look: Look, width: int) -> str:
    """The line of one track, at most `width` characters wide.

    What does not fit is given up in this order: the bar's length, the end of the metrics, the bar.
    """
    from rich.cells import cell_len, set_cell_size

    dot, more = (" • ", "…") if look.unicode else (" | ", "~")
    count = count_text(track)
    clock = f"{duration(track.elapsed)}{dot}{duration(track.remaining)}"
    speed = speed_text(track.speed)
    values = look.delimiter.join(metric_texts(metrics, look.metrics_format))
    fixed = cell_len(track.description) + len(count) + len(clock) + len(speed) + 4
    bar_width = max(_MIN_BAR, min(_MAX_BAR, width - fixed - (cell_len(values) + 1 if values else 0)))
    if fixed + bar_width > width:
        plain = " ".join((track.description, count, clock, speed))
        return set_cell_size(plain, width).rstrip() if cell_len(plain) > width else plain
    room = width - fixed - bar_width - 1
    if cell_len(values) > room:
        values = set_cell_size(values, room - 1).rstrip() + more if room > len(more) else ""
    parts = (
        look.styled("description", track.description),
        _bar(track, look, bar_width),
        look.styled("batch_progress", count),
        look.styled("time", clock),
        look.styled("processing_speed", speed),
        look.styled("metrics", values),
    )
    return " ".join(part for part in parts if part)


def render_plain(track: Track, metrics: dict[str, Any], look: Look) -> str:
    """The same in words, for a file or a log."""
    share = f" {track.completed / track.total:4.0%}" if 0 < track.total < math.inf else ""
    total = f"/{track.total:.0f}" if math.isfinite(track.total) else ""
    left = track.remaining if not track.finished else None
    clock = duration(track.elapsed) + (f" (about {duration(left)} left)" if left else "")
    values = "".join(", " + text for text in metric_texts(metrics, look.metrics_format))
    return f"{track.description}:{share} {track.completed}{total} in {clock}, {speed_text(track.speed)}{values}"


def _bar(track: Track, look: Look, width: int) -> str:
    full, empty = ("━", "━") if look.unicode else ("#", "-")
    if look.unicode and not look.codes:
        empty = " "
    if not math.isfinite(track.total) and not track.finished:  # unknown length: a block that wanders, once in 2 s
        block = max(3, width // 5)
        span = width - block
        phase = (track.elapsed % 2.0) - 1.0
        start = round(abs(phase) * span)
        pieces = (
            ("bar_back", empty * start),
            ("bar_pulse", full * block),
            ("bar_back", empty * (span - start)),
        )
    else:
        share = 1.0 if track.finished and not math.isfinite(track.total) else track.completed / max(track.total, 1)
        done = max(0, min(width, int(share * width)))
        pieces = (
            ("bar_finished" if done == width else "bar", full * done),
            ("bar_back", empty * (width - done)),
            ("", ""),
        )
    return "".join(look.styled(part, text) for part, text in pieces)


def metric_texts(metrics: dict[str, Any], number_format: str) -> list[str]:
    """`name=value` for each metric: Python numbers, 0-dim tensors, text, or dicts of them."""
    texts = []
    for name, given in metrics.items():
        if isinstance(given, dict):
            texts += metric_texts({f"{name}/{key}": item for key, item in given.items()}, number_format)
            continue
        value = given.item() if hasattr(given, "item") else given
        text = format(value, number_format) if isinstance(value, float) else str(value)
        if isinstance(value, float) and value and math.isfinite(value) and not text.strip("-0."):
            text = format(value, ".2e")  # a small number is not zero
        texts.append(f"{name}={text}")
    return texts


def count_text(track: Track) -> str:
    """Batches begun and in all, padded so that the line does not jump."""
    total = f"{track.total:.0f}" if math.isfinite(track.total) else "--"
    return f"{track.completed:>{len(total)}}/{total}"


def speed_text(speed: float | None) -> str:
    """Batches per second, two decimals below a thousand."""
    if speed is None:
        return "--it/s"
    return f"{speed:.2f}it/s" if speed < 1000 else f"{speed:.0f}it/s"


def duration(seconds: float | None) -> str:
    """h:mm:ss; dashes where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
