"""`lit-fast launch script.py ...`: a program in several processes, on one machine, on several, or as a job of SLURM's.

    lit-fast launch train.py --epochs 3                                   # one process for each GPU of this machine
    lit-fast launch --nproc-per-node 4 train.py
    lit-fast launch --nodes 2 --rdzv-endpoint node0:29400 train.py        # the same words on both machines
    lit-fast launch --slurm --nodes 2 --gpus-per-node 8 --time 12:00:00 train.py

Processes are started and watched by torchrun (`torch.distributed.run`), jobs submitted by submitit.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from lit_fast.errors import MisconfigurationException, RankFailedError

ANSWER_SECONDS = 5.0  # of a rendezvous on this machine, which takes a millisecond
JOIN_SECONDS = 600  # that nodes have to find each other, torchrun's default


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lit-fast launch",
        usage="lit-fast launch [options] (script.py | -m module) [arguments ...]",
        description="Runs a Python program in several processes, which a Trainer in it joins (docs/distributed.md). "
        "The Trainer's devices and num_nodes need not be given in it: the numbers here are their defaults.",
    )
    top.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (1)")
    top.add_argument(
        "--nproc-per-node", type=_count_or_auto, default="auto", metavar="N", help="processes a machine; auto: its GPUs"
    )
    top.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet: one of them, and a free port there"
    )
    top.add_argument("--rdzv-id", default="lit-fast", metavar="NAME", help="tells runs at one endpoint apart")
    top.add_argument(
        "--join-timeout", type=_count, default=JOIN_SECONDS, metavar="SECONDS", help="how long machines are waited for"
    )
    top.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="how often all are started again where one fails (0)"
    )
    slurm = top.add_argument_group("SLURM")
    slurm.add_argument("--slurm", action="store_true", help="submit a job of --nodes times --nproc-per-node tasks")
    slurm.add_argument("--job-name", metavar="NAME", help="the script's name where left out")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--account", metavar="NAME")
    slurm.add_argument("--qos", metavar="NAME")
    slurm.add_argument("--constraint", metavar="LIST")
    slurm.add_argument("--time", type=_minutes, metavar="[D-]HH:MM:SS", help="or minutes (60)")
    slurm.add_argument("--gpus-per-node", type=_count, metavar="N")
    slurm.add_argument("--cpus-per-task", type=_count, metavar="N")
    slurm.add_argument("--mem", metavar="SIZE", help="of a machine, as in 64GB")
    slurm.add_argument(
        "--requeue-before", type=_count, default=90, metavar="SECONDS", help="SIGUSR1 comes so long before the end (90)"
    )
    slurm.add_argument("--log-dir", default="slurm_logs", metavar="FOLDER", help="of scripts and outputs (slurm_logs)")
    slurm.add_argument("--wait", action="store_true", help="until the job is done; the exit code is 1 where it failed")
    slurm.add_argument("--cluster", choices=["slurm", "local"], default="slurm", help="local: on this machine, to try")
    top.add_argument("-m", dest="module", action="store_true", help="the program is a module's name, not a file")
    top.add_argument("program", help="script.py")
    top.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the program")
    return top


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: that of the process that failed first, or 0."""
    command = parser()
    options = command.parse_args(argv)
    if not options.module and not os.path.isfile(options.program):
        command.error(f"there is no file {options.program!r}; for a module: lit-fast launch -m {options.program}")
    return submit(options) if options.slurm else launch(options)


# -- torchrun


def launch(options: argparse.Namespace) -> int:
    """Start this machine's processes and wait for them; returns the exit code.

    Raises:
        MisconfigurationException: several nodes without an endpoint, a port that another program has, or nodes that did
            not come.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.run import get_args_parser, run

    from lit_fast.strategies.launchers.launcher import how_it_ended, limit_threads

    processes = _processes(options)
    words = ["--nnodes", str(options.nodes), "--nproc-per-node", str(processes)]
    words += ["--max-restarts", str(options.max_restarts)]
    if options.rdzv_endpoint is None and options.nodes > 1:
        raise MisconfigurationException(
            f"--nodes {options.nodes} needs --rdzv-endpoint HOST:PORT, the same on every machine: the name of one of "
            f"them, and a port that is free there."
        )
    if options.rdzv_endpoint is None:
        words += ["--standalone"]
    else:
        check_endpoint(options.rdzv_endpoint)
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", options.rdzv_endpoint, "--rdzv-id", options.rdzv_id]
        words += ["--rdzv-conf", f"join_timeout={options.join_timeout}"]
    words += [*(["-m"] if options.module else []), options.program, *options.arguments]
    limit_threads(processes)
    _defaults(options, processes)
    try:
        run(get_args_parser().parse_args(words))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ended = how_it_ended(rank, failure.pid, failure.exitcode)
        print(f"lit-fast launch: {ended}. What it wrote above, if anything, says why.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # the processes were sent it, and have ended
        return 128 + error.sigval
    except RendezvousTimeoutError as error:
        raise MisconfigurationException(
            f"Not all of the {options.nodes} machines came to {options.rdzv_endpoint} within {options.join_timeout} "
            f"seconds; start the same command on each of them, or wait longer (--join-timeout)."
        ) from error
    except RendezvousConnectionError as error:
        raise MisconfigurationException(
            f"The machines cannot meet at --rdzv-endpoint {options.rdzv_endpoint}: nothing answers there. It has to be "
            f"one of the machines that this command is started on, by a name that all of them know."
        ) from error
    return 0


def check_endpoint(endpoint: str) -> None:
    """Raise a MisconfigurationException for an endpoint that is none, or on a port that another program has."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise MisconfigurationException(
            f"--rdzv-endpoint {endpoint!r} is not HOST:PORT; allowed is a machine's name or address and a port, as in "
            f"node0:29400."
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise MisconfigurationException(
            f"--rdzv-endpoint {endpoint!r}: this machine does not know the host {host!r} ({error.strerror})."
        ) from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # not this machine's address: another one listens
                return
        else:
            return
    if not _is_store(host, int(port)):
        raise MisconfigurationException(
            f"--rdzv-endpoint {endpoint!r}: another program listens on port {port} of this machine; choose another."
        )


def _is_store(host: str, port: int) -> bool:
    """Whether a rendezvous of torch's is there already, of a node that was started before on this machine."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    answered: list[int] = []
    limit = timedelta(seconds=ANSWER_SECONDS)  # to connect

    def ask() -> None:
        with suppress(Exception):  # torch has several, and which one is raised depends on what listens
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
            answered.append(store.num_keys())

    # In a thread, since torch waits without an end for an answer that another program never gives.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return bool(answered)


def _processes(options: argparse.Namespace) -> int:
    """On each node."""
    if options.nproc_per_node != "auto":
        return int(options.nproc_per_node)
    if options.slurm:
        return int(options.gpus_per_node or 1)
    import torch

    return max(1, torch.cuda.device_count())


def _defaults(options: argparse.Namespace, processes: int) -> None:
    """What a Trainer takes where its program says nothing."""
    os.environ.setdefault("PL_TRAINER_DEVICES", str(processes))
    os.environ.setdefault("PL_TRAINER_NUM_NODES", str(options.nodes))


# -- SLURM


def submit(options: argparse.Namespace) -> int:
    """Submit a job and say its number and where its outputs are.

    Raises:
        MisconfigurationException: submitit is not installed, SLURM is not there, or refused the job.
        RankFailedError: with --wait: a task failed.
    """
    # submitit's own signal before a job's end, by which a Trainer has its job requeued; read when it is imported.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    try:
        import submitit
    except ImportError as error:
        raise MisconfigurationException(
            "lit-fast launch --slurm submits jobs through submitit, which is not installed: "
            "pip install 'lit-fast[slurm]'."
        ) from error
    processes = _processes(options)
    _defaults(options, processes)
    given = {
        "nodes": options.nodes,
        "tasks_per_node": processes,
        "timeout_min": options.time or 60,
        "name": options.job_name or Path(options.program).stem,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "slurm_mem": options.mem,
        **{f"slurm_{name}": getattr(options, name) for name in ("partition", "account", "qos", "constraint")},
        "slurm_signal_delay_s": options.requeue_before,
    }
    words = [*(["-m"] if options.module else []), options.program, *options.arguments]
    try:
        executor = submitit.AutoExecutor(folder=options.log_dir, cluster=options.cluster)
        executor.update_parameters(**{name: value for name, value in given.items() if value is not None})
        job = executor.submit(Task([sys.executable, *words], os.getcwd()))
    except (
        RuntimeError,
        ValueError,
        OSError,
        subprocess.CalledProcessError,
        submitit.core.utils.FailedJobError,
    ) as error:
        raise MisconfigurationException(f"The job was not submitted: {error}") from error
    tasks = options.nodes * processes
    print(f"job {job.job_id}: {tasks} {'task' if tasks == 1 else 'tasks'}; outputs: {job.paths.folder}", flush=True)
    if options.wait:
        try:
            job.results()
        except submitit.core.utils.FailedJobError as error:
            raise RankFailedError(f"job {job.job_id} failed: {error}", rank=0, host="", pid=None) from error
    return 0


class Task:
    """What submitit runs in each task of a job: the program, with signals handed on to it.

    In a job of SLURM's the program finds its place in SLURM's variables; on this machine it is told.
    """

    def __init__(self, command: list[str], folder: str) -> None:
        self.command, self.folder = command, folder

    def __call__(self) -> None:
        import submitit

        here = submitit.JobEnvironment()
        if here.cluster != "slurm":
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            os.environ["NODE_RANK"] = str(here.node)
        process = subprocess.Popen(self.command, cwd=self.folder)
        for number in (signal.SIGUSR1, signal.SIGTERM):  # submitit's handlers would requeue the job by themselves
            signal.signal(number, lambda number, frame: process.send_signal(number))
        code = process.wait()
        if code:
            from lit_fast.strategies.launchers.launcher import how_it_ended

            raise RankFailedError(
                f"{how_it_ended(here.global_rank, process.pid, code)}.",
                rank=here.global_rank, host=here.hostname, pid=process.pid,
            )  # fmt: skip


# -- numbers


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _count_or_auto(text: str) -> Any:
    return text if text == "auto" else _count(text)


def _minutes(text: str) -> int:
    """SLURM's notations: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS; a part of a minute counts as one.

    >>> _minutes("90"), _minutes("12:00:00"), _minutes("1-06:30"), _minutes("1:30")
    (90, 720, 1830, 2)
    """
    found = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: minutes, [D-]HH:MM:SS, or D-HH")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        hours += 24 * int(found["days"])
    else:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return hours * 60 + minutes + (seconds > 0)
