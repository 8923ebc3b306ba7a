"""Loader workers leave Ctrl-C and SIGTERM to the training process.

A terminal, and a job scheduler, send them to the whole process group. The training process finishes its step and saves
a checkpoint, for which it may still need a batch; torch's workers would die at once, and the run with an error.
"""

from __future__ import annotations

import os
import signal
from typing import Any

GRACE_SECONDS = 60.0  # after SIGTERM: for a step and a checkpoint; then the worker ends without being asked


def leave_to_parent() -> None:
    """Called in a new worker. A second SIGTERM ends it at once; it ends anyway when the training process is gone."""
    signal.signal(signal.SIGINT, _wait)  # not SIG_IGN, which the programs that a dataset starts would inherit
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, _last_orders)


def _wait(number: int, frame: Any) -> None:
    """The training process stops the worker when it is done."""


def _last_orders(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)


def _end(number: int, frame: Any) -> None:
    os._exit(0)  # as torch's own handler does
