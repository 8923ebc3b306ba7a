"""Loader workers leave Ctrl-C, SIGTERM and SIGUSR1 to the process that runs the trainer.

A terminal, and a job scheduler, send them to the whole process group. That process finishes its step and saves a
checkpoint, for which it may still need a batch; torch's workers would die at once, the run with an error, and the
folders of their sockets would stay.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

GRACE_SECONDS = 60.0  # after SIGTERM: for a step and a checkpoint; then the worker ends without being asked


def leave_to_parent() -> None:
    """Called in a new worker. A second SIGTERM ends it at once; it ends anyway when the training process is gone."""
    signal.signal(signal.SIGINT, _wait)  # not SIG_IGN, which the programs that a dataset starts would inherit
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, _last_orders)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _wait)  # SLURM's, to all processes of a job that is about to end


def _wait(number: int, frame: Any) -> None:
    """The training process stops the worker when it is done."""


def _last_orders(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)


def _end(number: int, frame: Any) -> None:
    os._exit(0)  # as torch's own handler does


@atexit.register
def _stop_workers() -> None:
    """What is alive when the program ends, such as persistent workers, is asked to end.

    multiprocessing would send it one SIGTERM and wait. This module imports torch's loaders, so this runs before their
    exit hooks and multiprocessing's.
    """
    if not active_children():
        return
    for found in gc.get_objects():
        if issubclass(type(found), _MultiProcessingDataLoaderIter):
            workers = getattr(found, "_workers", ())
            if workers and workers[0]._parent_pid == os.getpid():  # not those of the process that forked this one
                found._shutdown_workers()


class _Init:
    """A loader's `worker_init_fn`, and `leave_to_parent` before it."""

    def __init__(self, own: Callable[[int], Any] | None) -> None:
        self.own = own

    def __call__(self, worker_id: int) -> None:
        leave_to_parent()
        if self.own is not None:
            self.own(worker_id)


@contextmanager
def left_to_parent(loaders: list[Any]) -> Iterator[None]:
    """Workers that these loaders start inside leave signals to this process; afterwards the loaders are as before."""
    own = [(loader, loader.worker_init_fn) for loader in loaders if isinstance(loader, DataLoader)]
    for loader, init in own:
        loader.worker_init_fn = _Init(init)
    try:
        yield
    finally:
        for loader, init in own:
            loader.worker_init_fn = init
