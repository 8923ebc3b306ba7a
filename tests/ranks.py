"""A function in several processes of one job, as a launcher would start them; each is forked from one that has torch.

The function and what it returns must pickle: define it at the top of the test's file.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from new_process import SERVER, start_as_usual


class RankFailed(AssertionError):
    """A process of the job ended by an exception or a signal; the message holds every process's traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 40.0, **env: str
) -> list[Any]:
    """`function(*args)` in processes of ranks 0 .. world_size - 1; what each returned, by rank. Prints what they print.

    LOCAL_RANK, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, and `env` besides.

    Raises:
        RankFailed: one raised, died, or ran longer than `timeout` seconds; no process is left then.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", **env,
        }  # fmt: skip
        processes = []
        for rank in range(world_size):
            own = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            target = (function, args, own, Path.cwd(), Path(folder, str(rank)), 0.9 * timeout)
            processes.append(SERVER.Process(target=_begin, args=target))
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        try:
            while any(p.exitcode is None for p in processes) and time.monotonic() < end:
                if any(p.exitcode for p in processes):
                    end = min(end, time.monotonic() + 10.0)  # the others may have something to say
                time.sleep(0.01)
        finally:
            late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            for rank in late:
                processes[rank].kill()
                processes[rank].join()
        said = [_read(Path(folder, str(rank))) for rank in range(world_size)]
        for rank in range(world_size):
            print(_printed_by(Path(folder, str(rank))), end="")
    if late or any(process.exitcode for process in processes):
        lines = [
            f"rank {rank}: exit code {process.exitcode}{' (killed: too late)' if rank in late else ''}\n{error or ''}"
            for rank, (process, (_, error)) in enumerate(zip(processes, said, strict=True))
        ]
        raise RankFailed("\n".join(lines))
    return [result for result, _ in said]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _printed_by(path: Path) -> str:
    printed = path.with_suffix(".out")
    return printed.read_text() if printed.exists() else ""


def _read(path: Path) -> tuple[Any, str | None]:
    return pickle.loads(path.read_bytes()) if path.exists() else (None, None)


def _begin(
    function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], folder: Path, said: Path, timeout: float
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(said.with_suffix(".out"), os.O_WRONLY | os.O_CREAT), 1)  # the server's is that of an earlier test
    start_as_usual()
    import torch

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout, file=sys.stderr)
    result, error = None, None
    try:
        result = function(*args)
    except BaseException:
        error = traceback.format_exc()
        print(error, file=sys.stderr)
    said.write_bytes(pickle.dumps((result, error)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)  # a thread of a process group that lost its peers would hold an orderly end up
