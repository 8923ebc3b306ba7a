"""Files of what a process has recorded, written beside a run that goes on."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lit_fast.profiler import files, record

T = TypeVar("T")
Made = TypeVar("Made")
FIRST = 0.2  # s until the first file: a run that is killed early leaves one too
PAUSE = 1e-4  # s: long enough for another thread to take the interpreter's lock, which waits for 5 ms otherwise
FEW = 32  # objects that are made at a time: less than 0.1 ms


def let_others_run() -> None:
    """In a thread beside the run: a step that wants the interpreter gets it here."""
    if threading.current_thread() is not threading.main_thread():
        time.sleep(PAUSE)


def in_pieces(make: Callable[[T], Made], items: Iterable[T]) -> list[Made]:
    """`make(item)` of each; other threads may run after every few of them."""
    made: list[Made] = []
    for item in items:
        made.append(make(item))
        if len(made) % FEW == 0:
            let_others_run()
    let_others_run()
    return made


@contextmanager
def apart_from_the_run(what: str) -> Iterator[None]:
    """What goes wrong inside is warned of, as `what`, and the run goes on: a profiler never ends one."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what}: {type(error).__name__}: {error}.", RuntimeWarning, stacklevel=3)


class PeriodicWriter:
    """Writes a profile every few seconds from a thread of its own, and once more at the end.

    The thread lets go of the interpreter between any two pieces of the file, so that a step waits for one piece at
    most. A folder that cannot be written is warned of once, and the run goes on.

    Args:
        profile: what to write.
        path: of the file, which is replaced as a whole.
        every: seconds.
    """

    def __init__(self, profile: Callable[[], record.Profile], path: Path, every: float) -> None:
        self._profile, self._path, self._every = profile, path, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lit_fast profile", daemon=True)

    def start(self) -> None:
        """Write from now on."""
        # The first collection of all that was ever imported takes 0.1 s: here it delays no step. A loop that lets go of
        # what it allocates never has one, but objects that are kept for a file would set it off.
        gc.collect()
        self._thread.start()

    def end(self) -> None:
        """Stop, and write what there is now."""
        self._ended.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        wait = min(FIRST, self._every)
        while not self._ended.wait(wait):
            if not self._write():
                return
            wait = self._every

    def _write(self) -> bool:
        written = False
        with apart_from_the_run(f"The profile {self._path} could not be written"):
            files.write(self._profile(), self._path, between=let_others_run)
            written = True
        return written
