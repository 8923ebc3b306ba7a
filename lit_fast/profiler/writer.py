"""Files of what a process has recorded, written beside a run that goes on."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from lit_fast.profiler import record

FIRST = 1.0  # s until the first file: a run that is killed early leaves one too
PAUSE = 1e-4  # s: long enough for another thread to take the interpreter's lock, which waits for 5 ms otherwise


def let_others_run() -> None:
    """In a thread beside the run: a step that wants the interpreter gets it here."""
    if threading.current_thread() is not threading.main_thread():
        time.sleep(PAUSE)


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
        try:
            record.write(self._profile(), self._path, between=let_others_run)
        except OSError as error:
            warnings.warn(f"The profile {self._path} could not be written: {error}.", RuntimeWarning, stacklevel=2)
            return False
        return True
