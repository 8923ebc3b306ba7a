"""What the Trainer asks of a launcher, and what every launcher does for its processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.rank_zero import rank_zero_info
from lit_fast.strategies.members import ending

# Seconds that the other processes have, after one failed, to notice and to end by themselves: to hear of it in a
# collective, to run `on_exception`, to write a checkpoint. Then they are killed.
GRACE_SECONDS = 15.0

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Found now: a forked process must not ask the dynamic linker, whose lock a thread that is gone may have held.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Launcher(ABC):
    """Starts the processes of this machine, one a device, and calls a function in each."""

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Whether it works in a notebook, or in an interpreter that somebody types into."""

    @abstractmethod
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call `function(*args, **kwargs)` in every process, and return what the first one's returns.

        Args:
            trainer: whose state is brought back, where the function runs in other processes than this one.
        """

    @abstractmethod
    def kill(self, signum: int) -> None:
        """Send a signal to every process that was started and still runs."""

    def refuse_interactive(self, strategy: str) -> None:
        """Raise a MisconfigurationException where somebody types into this interpreter, and that cannot work."""
        if is_interactive() and not self.is_interactive_compatible:
            raise MisconfigurationException(
                f"{strategy} starts its processes in a way that an interactive session does not allow: in a notebook, "
                f"IPython or `python -i` there is no program that they could run. Set "
                f"Trainer(strategy='ddp_notebook'), or run the code as a script."
            )


def is_interactive() -> bool:
    """Whether this is a notebook, IPython, or an interpreter that prompts (`python`, `python -i`)."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def place(environment: Any, local_rank: int, num_processes: int, num_nodes: int) -> dict[str, str]:
    """The environment variables that tell a process its place, those that torchrun sets."""
    node_rank = environment.node_rank()
    return {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "WORLD_SIZE": str(num_processes * num_nodes),
        "RANK": str(node_rank * num_processes + local_rank),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "LOCAL_RANK": str(local_rank),
        "NODE_RANK": str(node_rank),
        "GROUP_RANK": str(node_rank),
    }


def limit_threads(num_processes: int) -> None:
    """Share the processor cores among the processes of this machine, unless OMP_NUM_THREADS says how many each gets.

    Each of them would start a thread for every core otherwise.
    """
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, core_count() // num_processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        rank_zero_info(
            "%d processes share %d processor cores: each computes with OMP_NUM_THREADS=%d. Set that variable to "
            "choose another number.",
            num_processes, core_count(), threads,
        )  # fmt: skip


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with(parent: int) -> None:
    """Have this process killed when the process `parent`, or the thread of it that started this one, ends (Linux).

    Elsewhere nothing happens. What the parent was doing does not matter: SIGKILL reaches a process that hangs.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)


def how_it_ended(rank: int, pid: int | None, code: int) -> str:
    """A clause like "rank 1 (pid 42 on node3) was killed by SIGKILL", of an exit code, or minus a signal's number."""
    return f"rank {rank} (pid {pid} on {socket.gethostname()}) {ending(code)}"
