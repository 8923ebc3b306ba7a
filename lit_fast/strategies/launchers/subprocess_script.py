"""The program itself, started again for every further device: what a plain script with `devices=4` does."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed

from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.launchers import launcher
from lit_fast.strategies.launchers.launcher import Launcher, die_with, how_it_ended, limit_threads, place
from lit_fast.strategies.watchdog import note_death

_TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM has ended after a step that all agreed on
_SECONDS_TO_RAISE = 1.0  # that this process has to hear of a failure by itself, in a collective


class SubprocessScriptLauncher(Launcher):
    """Runs the same command line again, once for each further device, with variables that tell each its place.

    This process is local rank 0. The others run the program from its beginning and come to the same call. On several
    nodes the program is started once on each. Where something else started the processes (torchrun, SLURM), or this
    is one of those that were started, nothing is started.

    No process outlives the others: the kernel kills them when this one ends, however it ends (Linux). When one of
    them ends with an exit code or by a signal, a message says which and why, this process has `GRACE_SECONDS` to
    notice, and ends with an exit code that is not 0. After its last line this process waits for the others.

    Args:
        cluster_environment: where this process finds its place.
        num_processes: how many processes this machine has.
        num_nodes: how many machines there are.
    """

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int = 1) -> None:
        self.cluster_environment = cluster_environment
        self.num_processes, self.num_nodes = num_processes, num_nodes
        self.procs: list[subprocess.Popen[bytes]] = []  # without this one
        self.failure: str | None = None  # which of them failed, and how
        self._exit_code = 0
        self._watchers: list[threading.Thread] = []
        self._ended = threading.Event()  # this process has come to its end
        self._raised = False  # the function, or what came after it

    @property
    def is_interactive_compatible(self) -> bool:
        return False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes where they are not there yet, and call the function in this one.

        Raises:
            ClusterError: the numbers do not fit what started this process.
            MisconfigurationException: there is no command line that could be run again.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        limit_threads(self.num_processes)
        if not self.cluster_environment.creates_processes_externally:
            self._start()
        try:
            return function(*args, **kwargs)
        except BaseException:
            self._raised = True
            raise

    def kill(self, signum: int) -> None:
        for process in self.procs:
            process.send_signal(signum)  # does nothing where it has ended

    def _start(self) -> None:
        self.refuse_interactive("Trainer(strategy='ddp')")
        command = command_line()
        places = [
            place(self.cluster_environment, local_rank, self.num_processes, self.num_nodes)
            for local_rank in range(self.num_processes)
        ]
        os.environ.update(places[0])
        self._pid = os.getpid()
        atexit.register(self._end)
        for variables in places[1:]:
            # Only two system calls, found beforehand, are made between fork and exec: threads cannot hold them up.
            end = partial(die_with, os.getpid())
            process = subprocess.Popen(command, env={**os.environ, **variables}, preexec_fn=end)  # noqa: PLW1509
            self.procs.append(process)
            watcher = threading.Thread(
                target=self._watch, args=(int(variables["RANK"]), process), daemon=True, name="lit_fast-watch-process"
            )
            self._watchers.append(watcher)
            watcher.start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if code == 0 or self.failure is not None:
            return
        self._exit_code = code if code > 0 else 128 - code
        if code == _TERMINATED:  # as this process is: it may be writing the checkpoint of all
            return
        self.failure = how_it_ended(rank, process.pid, code)
        note_death(rank, code)
        self._ended.wait(_SECONDS_TO_RAISE)
        if not self._raised:  # an error that this process ends by says it, too
            _say(f"{self.failure}; the whole run ends. What it wrote above, if anything, says why.")
        if not self._ended.wait(launcher.GRACE_SECONDS):
            _leave(self._exit_code)

    def _end(self) -> None:
        """At the end of this process: the others end by themselves, or are made to where one failed."""
        if os.getpid() != self._pid:  # a fork of this process inherits what is due at its end
            return
        unhandled = getattr(sys, "last_value", None) is not None
        self._raised |= unhandled
        self._ended.set()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # whoever waits for this rank hears that it is gone
        until = time.monotonic() + launcher.GRACE_SECONDS
        for watcher in self._watchers:
            watcher.join(max(0.0, until - time.monotonic()))
        running = [process.pid for process in self.procs if process.poll() is None]
        if running and not self._raised and not self._exit_code:
            _say(f"this process is done and waits for the others of its run (pid {', '.join(map(str, running))}).")
            for watcher in self._watchers:
                watcher.join()
        if unhandled or self._exit_code:
            _leave(self._exit_code or 1)


def command_line() -> list[str]:
    """The command that started this program, interpreter and its options included.

    Raises:
        MisconfigurationException: it came from standard input, or this is a process of `multiprocessing`'s.
    """
    if multiprocessing.parent_process() is not None:
        raise MisconfigurationException(
            "Trainer(strategy='ddp') runs the program again for each further device, and this process is one that "
            "`multiprocessing` started out of a program; set strategy='ddp_spawn' or 'ddp_fork', or start the program "
            "with torchrun."
        )
    given = sys.orig_argv[1:]
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None and "-c" not in given:
        raise MisconfigurationException(
            "Trainer(strategy='ddp') runs the program again for each further device, and this one was read from "
            "standard input; write it to a file, or start it with `python -c`."
        )
    if file is not None:  # the program may have changed its directory since; Python made this path absolute
        script = sys.argv[0] if sys.argv else ""
        given = [file if text == script and Path(file).name == Path(text).name else text for text in given]
    return [sys.executable, *given]


def _say(message: str) -> None:
    sys.stderr.write(f"lit_fast: {message}\n")
    sys.stderr.flush()


def _leave(code: int) -> None:
    """End this process now, whatever its main thread waits for; the kernel ends those that it started."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
