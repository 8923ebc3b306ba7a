"""Processes that SLURM's `srun` started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

from lit_fast.errors import ClusterError, PossibleUserWarning
from lit_fast.rank_zero import rank_zero_warn
from lit_fast.strategies.environments.cluster_environment import ExternalEnvironment, check_world_size, int_variable

_READER = "SLURMEnvironment reads it, and srun sets it"


class SLURMEnvironment(ExternalEnvironment):
    """A job of SLURM's, whose tasks `srun` starts. MASTER_ADDR and MASTER_PORT may be set to override its own choice.

    Args:
        auto_requeue: on `requeue_signal` a fit writes a checkpoint, puts its job back into the queue and ends; begun
            again, it goes on from there.
        requeue_signal: SIGUSR1 where left out; SLURM sends it 90 seconds before the end of a job that was submitted
            with `--signal=SIGUSR1@90`.

    Raises:
        ClusterError: the job asks for tasks by `--ntasks` alone, so that nobody knows how many a node gets.

    Example::

        Trainer(devices=8, num_nodes=4, plugins=[SLURMEnvironment(requeue_signal=signal.SIGHUP)])
    """

    started_by = "srun"
    world_size_variable = "SLURM_NTASKS"
    global_rank_variable = "SLURM_PROCID"
    local_rank_variable = "SLURM_LOCALID"

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        super().__init__()
        self.auto_requeue = auto_requeue
        if requeue_signal is None and sys.platform != "win32":
            requeue_signal = signal.SIGUSR1
        self.requeue_signal = requeue_signal
        _warn_without_srun()
        tasks = int_variable("SLURM_NTASKS", _READER, default=1)
        if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ClusterError(
                f"The SLURM job has --ntasks={tasks}, which does not say how many of them a node gets; submit it with "
                f"--ntasks-per-node and --nodes instead (for one node: --ntasks-per-node={tasks})."
            )

    @property
    def main_address(self) -> str:
        """The first node of the job."""
        if "MASTER_ADDR" not in os.environ:
            nodes = os.environ.get("SLURM_NODELIST", "127.0.0.1")
            os.environ["MASTER_ADDR"] = self.resolve_root_node_address(nodes)
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """Made of the job's number, so that every process finds the same: 15000 plus its last four digits."""
        if "MASTER_PORT" not in os.environ:
            job = os.environ.get("SLURM_JOB_ID")
            os.environ["MASTER_PORT"] = "12910" if job is None else str(15000 + int(job[-4:]))
        return self.number("MASTER_PORT")

    @staticmethod
    def detect() -> bool:
        """Whether srun started this process, in a job that is not named "bash" or "interactive".

        Under those names SLURM gave the machine only, and processes are started otherwise.
        """
        _warn_without_srun()
        return srun_used()

    @staticmethod
    def job_name() -> str | None:
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """The job's number; None where there is none, and in interactive jobs, whose runs would share it."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return int(job) if job.isdecimal() and not _interactive() else None

    def node_rank(self) -> int:
        return self.number("SLURM_NODEID")

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise a ClusterError where the job has other numbers of nodes, or of tasks on each, than the Trainer."""
        if _interactive():
            return
        for variable, option, argument, given in (
            ("SLURM_NTASKS_PER_NODE", "--ntasks-per-node", "devices", num_devices),
            ("SLURM_NNODES", "--nodes", "num_nodes", num_nodes),
        ):
            there = int_variable(variable, _READER, default=given)
            if there != given:
                raise ClusterError(
                    f"Trainer({argument}={given}), and the SLURM job has {option}={there}; set {argument}={there}, or "
                    f"submit the job with {option}={given}."
                )
        check_world_size(
            int_variable("SLURM_NTASKS", _READER, default=num_devices * num_nodes), num_devices, num_nodes, "srun"
        )

    def requeue(self) -> str:
        """Put this job, or this one of an array of jobs, back into the queue; returns its number.

        Raises:
            ClusterError: SLURM refused, or its command `scontrol` is not there.
        """
        job = os.environ.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        except OSError as error:
            raise ClusterError(f"`scontrol requeue {job}` could not be run: {error.strerror}.") from error
        if done.returncode:
            raise ClusterError(f"`scontrol requeue {job}` failed ({done.returncode}): {done.stderr.strip()}")
        return job

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """The first host of a list in one of SLURM's notations.

        >>> SLURMEnvironment.resolve_root_node_address("node[05-09,12],login")
        'node05'
        """
        first = re.match(r"(\[[^\]]*\]|[^\s,])*", nodes)
        return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _interactive() -> bool:
    return SLURMEnvironment.job_name() in ("bash", "interactive")


def srun_used() -> bool:
    """Whether srun started this process; `detect` without its warning."""
    return "SLURM_NTASKS" in os.environ and not _interactive()


def _warn_without_srun() -> None:
    if sys.platform != "win32" and not srun_used() and shutil.which("srun") is not None:
        command = " ".join(["srun", os.path.basename(sys.executable), *sys.argv])
        rank_zero_warn(
            f"SLURM is installed here, and srun did not start this process: it runs alone. In a SLURM job, start it "
            f"with `{command[:64]}{' ...' if len(command) > 64 else ''}`.",
            category=PossibleUserWarning,
        )
