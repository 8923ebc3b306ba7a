"""Processes made of this one, for a function: `ddp_spawn`, `ddp_fork`, `ddp_notebook`."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lit_fast.checkpoint import rng
from lit_fast.errors import MisconfigurationException, RankFailedError, SIGTERMException
from lit_fast.rank_zero import rank_zero_info
from lit_fast.strategies.launchers import launcher, results
from lit_fast.strategies.launchers.launcher import (
    Launcher,
    die_with,
    how_it_ended,
    is_interactive,
    limit_threads,
    place,
)

_STRATEGIES = {"spawn": "ddp_spawn", "fork": "ddp_fork", "forkserver": "ddp_spawn"}


class MultiProcessingLauncher(Launcher):
    """Calls the function in new processes of this machine, and brings back what the first one came to.

    With "spawn" and "forkserver" the program is imported anew in each process, and what the function is given is
    copied there: it has to be picklable, and the program's own start guarded by `if __name__ == "__main__"`. With
    "fork" each begins as a copy of this one; CUDA must not have been used yet, and each computes with one thread,
    since GNU's OpenMP hangs in a process that was forked from one with more.

    The processes are killed when this one ends, however it ends (Linux).

    Args:
        strategy: has `cluster_environment`, `num_processes` (on this machine) and `num_nodes`.
        start_method: "spawn", "fork" or "forkserver".

    Raises:
        MisconfigurationException: another start method, or one that this platform does not have.
    """

    def __init__(self, strategy: Any, start_method: str = "spawn") -> None:
        there = multiprocessing.get_all_start_methods()
        if start_method not in there:
            raise MisconfigurationException(f"start_method={start_method!r}; allowed here are {', '.join(there)}.")
        self._strategy, self._start_method = strategy, start_method
        self.procs: list[BaseProcess] = []
        self._has_fitted = False

    @property
    def is_interactive_compatible(self) -> bool:
        return self._start_method == "fork"

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call the function in every process; returns the first one's value, its tensors on the CPU.

        Raises:
            RankFailedError: a process raised, or was ended; with its rank and its traceback.
            MisconfigurationException: the processes cannot be started this way, or the trainer has fitted before.
        """
        self._check(trainer)
        with tempfile.TemporaryDirectory(prefix="lit_fast-") as folder:
            call: Any = (function, args, kwargs, trainer)
            if self._start_method != "fork":
                call = _packed(call)
            self._start(call, Path(folder))
            with self._terminating():
                self._join(Path(folder))
            if not (Path(folder) / "result.pt").exists():
                raise self._failure(Path(folder), self.procs[:1])  # it left by sys.exit(0)
            # Written by a process of our own into a folder that nobody else may write: code in it is ours.
            came_to = torch.load(Path(folder) / "result.pt", map_location="cpu", weights_only=False)
        if trainer is not None:
            results.restore(trainer, came_to["trainer"])
            self._has_fitted |= results.is_fit(trainer)
        return came_to["value"]

    def kill(self, signum: int) -> None:
        for process in self.procs:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signum)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "procs": []}  # a handle on a process means nothing in another

    def _check(self, trainer: Any) -> None:
        name = f"Trainer(strategy={_STRATEGIES[self._start_method]!r})"
        environment = self._strategy.cluster_environment
        self.refuse_interactive(name)
        if environment.creates_processes_externally:
            raise MisconfigurationException(
                f"{name} starts processes, and this one was started as one of several ({type(environment).__name__}); "
                f"set strategy='ddp', which takes those that are there, or start the program with plain `python`."
            )
        environment.validate_settings(num_devices=self._strategy.num_processes, num_nodes=self._strategy.num_nodes)
        if self._has_fitted and results.is_fit(trainer):
            raise MisconfigurationException(
                f"{name} has fitted already: optimizers and counters stayed in processes that have ended, and only the "
                f"weights came back. Make a new Trainer for another fit; fit(ckpt_path=...) goes on from a checkpoint."
            )
        if self._start_method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise MisconfigurationException(
                f"{name} forks this process, and CUDA, which has been used in it, cannot be used in a fork. Leave out "
                f"whatever used it before the fit (tensors or models on the device, torch.cuda functions), or set "
                f"strategy='ddp'." + (" In a notebook, restart the kernel first." if is_interactive() else "")
            )
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise MisconfigurationException(
                f"{name} imports the program in each new process, and that import came to the fit itself: put what "
                f"starts the program under `if __name__ == \"__main__\":`, or set strategy='ddp'."
            )

    def _start(self, call: Any, folder: Path) -> None:
        strategy, context = self._strategy, multiprocessing.get_context(self._start_method)
        globals_ = None if self._start_method == "fork" else _Globals()
        if self._start_method == "fork" and strategy.num_processes > 1:
            rank_zero_info("Each forked process computes with one thread; strategy='ddp' or 'ddp_spawn' uses more.")
        self.procs = []
        for local_rank in range(strategy.num_processes):
            variables = place(strategy.cluster_environment, local_rank, strategy.num_processes, strategy.num_nodes)
            process = context.Process(  # type: ignore[attr-defined]
                target=_run,
                args=(call, variables, os.getpid(), globals_, str(folder), self._start_method),
                name=f"rank {variables['RANK']}",
            )
            process.start()
            self.procs.append(process)

    def _rank(self, process: BaseProcess) -> int:
        node_rank: int = self._strategy.cluster_environment.node_rank()
        return node_rank * int(self._strategy.num_processes) + self.procs.index(process)

    def _join(self, folder: Path) -> None:
        """Wait for all; where one fails, the others have a while to notice, then they are killed."""
        running, failed = list(self.procs), []
        until: float | None = None
        try:
            while running and (until is None or time.monotonic() < until):
                wait([process.sentinel for process in running], None if until is None else until - time.monotonic())
                for process in [process for process in running if not process.is_alive()]:
                    running.remove(process)
                    if process.exitcode:
                        failed.append(process)
                if failed and until is None:
                    until = time.monotonic() + launcher.GRACE_SECONDS
        except KeyboardInterrupt:  # a terminal sends it to all of them: they write their checkpoints
            for process in running:
                process.join(launcher.GRACE_SECONDS)
            raise
        finally:
            for process in running:
                process.kill()
                process.join()
        if failed:
            raise self._failure(folder, failed)

    def _failure(self, folder: Path, failed: list[BaseProcess]) -> RankFailedError:
        first, *others = sorted(failed, key=lambda process: _when(folder, self._rank(process)))
        report = folder / f"{self._rank(first)}.txt"
        told = f":\n\n{report.read_text()}" if report.exists() else "."
        also = "".join(f"\nThen {how_it_ended(self._rank(p), p.pid, p.exitcode or 0)}." for p in others)
        return RankFailedError(
            f"{how_it_ended(self._rank(first), first.pid, first.exitcode or 0)}{told}{also}",
            rank=self._rank(first), host=socket.gethostname(), pid=first.pid,
        )  # fmt: skip

    @contextmanager
    def _terminating(self) -> Iterator[None]:
        """SIGTERM is handed to the processes, which write their checkpoints; this one ends after them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        came: list[int] = []

        def hand_on(number: int, frame: Any) -> None:
            came.append(number)
            self.kill(number)

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            yield
        except RankFailedError:
            if not came:
                raise
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        if came:
            raise SIGTERMException


class _Globals:
    """Settings of torch's, and random generators, that a process which imports everything anew would not have."""

    def __init__(self) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.benchmark = torch.backends.cudnn.benchmark
        self.matmul = torch.get_float32_matmul_precision()
        self.dtype = torch.get_default_dtype()
        self.rng = rng.capture(cuda=False)

    def restore(self) -> None:
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warns_only)
        torch.backends.cudnn.benchmark = self.benchmark
        torch.set_float32_matmul_precision(self.matmul)
        torch.set_default_dtype(self.dtype)
        rng.restore(self.rng)


def _packed(call: Any) -> bytes:
    """As bytes in which tensors are copied; `multiprocessing` itself would share their memory among the processes."""
    buffer = io.BytesIO()
    try:
        torch.save(call, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise MisconfigurationException(
            f"What new processes need cannot be copied to them ({error}). Define it at the top of a module (no "
            f"lambda, no class inside a function, no open file), or set strategy='ddp' or 'ddp_fork', which copy "
            f"nothing."
        ) from error
    return buffer.getvalue()


def _run(
    call: Any, variables: dict[str, str], parent: int, globals_: _Globals | None, folder: str, start_method: str
) -> None:
    """In a new process: the function, whose value, or traceback, is left in the folder."""
    die_with(os.getppid() if start_method == "forkserver" else parent)
    if start_method == "fork":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
    os.environ.update(variables)
    try:
        if globals_ is not None:
            globals_.restore()
            limit_threads(int(variables["LOCAL_WORLD_SIZE"]))
            call = torch.load(io.BytesIO(call), weights_only=False)
        function, args, kwargs, trainer = call
        came_to = {"value": function(*args, **kwargs)}
        if trainer is not None:
            came_to["trainer"] = results.collect(trainer)
        if variables["LOCAL_RANK"] == "0":
            torch.save(came_to, Path(folder) / "result.tmp")
            os.replace(Path(folder) / "result.tmp", Path(folder) / "result.pt")
    except (Exception, KeyboardInterrupt) as error:
        (Path(folder) / f"{variables['RANK']}.txt").write_text(traceback.format_exc())
        raise SystemExit(1) from error


def _when(folder: Path, rank: int) -> float:
    """When the rank failed, where it left a report: the cause comes before what follows from it."""
    report = folder / f"{rank}.txt"
    return report.stat().st_mtime if report.exists() else 0.0
