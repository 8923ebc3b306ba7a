"""The lowest lines of a terminal, rewritten in place, while everything that is printed appears above them."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_TO_END_OF_LINE, _TO_END_OF_SCREEN = "\x1b[K", "\x1b[J"


class LiveArea:
    """Owns the lowest lines of one terminal. Safe to use from several threads.

    While it is open, `sys.stdout` (and `sys.stderr` where it is a terminal) are replaced by `Above`, so that
    lines that anyone prints go above the area. While a printed line is unfinished (`print("...", end="",
    flush=True)`, a prompt) the area stays away, so that it never writes over it.

    A program that is forked while the area is open (DataLoader workers) writes straight to the terminal.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lock = threading.RLock()
        self.open = False
        self.lines: list[str] = []  # what the area shows, or will again
        self._drawn = 0  # lines of it that are on the screen now
        self._line_is_unfinished = False
        self._cursor_is_hidden = False
        self._above: dict[str, Above] = {}

    def start(self) -> None:
        """Take over the standard streams; the cursor is hidden from the first `draw` on."""
        with self.lock:
            self.open = True
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if stream is self.stream or is_terminal(stream):
                    self._above[name] = Above(self, stream)
                    setattr(sys, name, self._above[name])
        _watch_forks(self)

    def draw(self, lines: list[str]) -> bool:
        """Show `lines`, each of which must fit on one row. True where something was written."""
        with self.lock:
            if not self.open or (lines == self.lines and self._drawn == len(lines)):
                return False
            self.lines = lines
            if self._line_is_unfinished:
                return False
            hide = "" if self._cursor_is_hidden else HIDE_CURSOR
            self._cursor_is_hidden = True
            self._put(hide + self._frame())
            return True

    def clear(self) -> None:
        """Take the area off the screen, and show the cursor, until the next `draw`."""
        with self.lock:
            if self.open and self._cursor_is_hidden:
                self._cursor_is_hidden = False
                self._put(self._erase() + SHOW_CURSOR)

    def commit(self) -> None:
        """Leave the lines that are on the screen where they are, and go on below them."""
        with self.lock:
            if self.open and self._drawn:
                self._put("\n")
                self._drawn = 0

    def finish_line(self) -> None:
        """End an unfinished line, after which the area may be drawn again."""
        with self.lock:
            if self.open and self._line_is_unfinished:
                self._line_is_unfinished = False
                self._put("\n" + self._frame())

    def stop(self) -> None:
        """Leave the last lines on the screen, show the cursor, give the standard streams back."""
        with self.lock:
            if not self.open:
                return
            for name, above in self._above.items():
                with suppress(OSError, ValueError):
                    above.flush()
                if getattr(sys, name) is above:
                    setattr(sys, name, above.stream)
            self._above = {}
            self._put(("\n" if self._drawn else "") + (SHOW_CURSOR if self._cursor_is_hidden else ""))
            self._drawn, self._cursor_is_hidden = 0, False
            self.open = False

    def print_above(self, stream: Any, text: str) -> None:
        """Write `text` to `stream` above the area."""
        with self.lock:
            erase = self._erase()
            if stream is self.stream:
                text = erase + text
            elif erase:
                self._put(erase)
            self._line_is_unfinished = not text.endswith("\n")
            if stream is self.stream and not self._line_is_unfinished:
                text += self._frame()
            stream.write(text)
            stream.flush()
            if stream is not self.stream and not self._line_is_unfinished:
                self._put(self._frame())

    def _frame(self) -> str:
        """Control codes and text that bring `lines` onto the screen over what is drawn."""
        start = "\r" + f"\x1b[{self._drawn - 1}A" * (self._drawn > 1)
        clear_below = _TO_END_OF_SCREEN if self._drawn > len(self.lines) else ""
        self._drawn = len(self.lines)
        return start + "\n".join(line + _TO_END_OF_LINE for line in self.lines) + clear_below

    def _erase(self) -> str:
        if not self._drawn:
            return ""
        start = "\r" + f"\x1b[{self._drawn - 1}A" * (self._drawn > 1)
        self._drawn = 0
        return start + _TO_END_OF_SCREEN

    def _put(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the terminal was closed: there is nobody to show anything to
            self.stream.write(text)
            self.stream.flush()


class Above:
    """Stands in for a standard stream: whole lines go above the live area; all else is the stream's own."""

    def __init__(self, area: LiveArea, stream: Any) -> None:
        self.stream = stream
        self._area = area
        self._unfinished = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._area.lock:
            if not self._area.open:
                return int(self.stream.write(text))
            whole, newline, rest = (self._unfinished + text).rpartition("\n")
            self._unfinished = rest
            if newline:
                self._area.print_above(self.stream, whole + newline)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._area.lock:
            if self._unfinished and self._area.open:
                rest, self._unfinished = self._unfinished, ""
                self._area.print_above(self.stream, rest)
            self.stream.flush()

    def __iter__(self) -> Any:
        return iter(self.stream)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that understands cursor movement."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):
        return False


def columns(stream: Any) -> int:
    """Width of the terminal now, in characters; `COLUMNS` or 80 where it cannot be asked."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        width = 0
    if width > 0:
        return width
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdigit() and int(given) > 0 else 80


_opened: list[weakref.ref[LiveArea]] = []  # at most one: the area that was opened last


def _watch_forks(area: LiveArea) -> None:
    if not _opened and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_to_parent)
    _opened[:] = [weakref.ref(area)]


def _leave_to_parent() -> None:
    """In a forked child: the area stays the parent's, and its thread will never release the lock."""
    area = _opened[0]()
    if area is not None:
        area.lock = threading.RLock()
        area.open = False
        for above in area._above.values():
            above._unfinished = ""
