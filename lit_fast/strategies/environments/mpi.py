"""Processes that `mpirun` started."""

from __future__ import annotations

import socket
from functools import cached_property
from typing import Any

from lit_fast.strategies.environments.cluster_environment import ClusterEnvironment, check_world_size
from lit_fast.strategies.environments.lightning import find_free_network_port


class MPIEnvironment(ClusterEnvironment):
    """A job of MPI's. MPI is asked through the package mpi4py, which has to be installed.

    Raises:
        ModuleNotFoundError: mpi4py, or the MPI library that it needs, is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        mpi = _mpi()
        if mpi is None:
            raise ModuleNotFoundError(
                "MPIEnvironment needs mpi4py and an MPI library, and one of them is missing: pip install mpi4py.",
                name="mpi4py",
            )
        self._world = mpi.COMM_WORLD

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @cached_property
    def main_address(self) -> str:  # every process asks for it once, together
        return str(self._world.bcast(socket.gethostname(), root=0))

    @cached_property
    def main_port(self) -> int:
        return int(self._world.bcast(find_free_network_port(), root=0))

    @staticmethod
    def detect() -> bool:
        """Whether MPI has more than one process."""
        mpi = _mpi()
        return mpi is not None and mpi.COMM_WORLD.Get_size() > 1

    def world_size(self) -> int:
        return int(self._world.Get_size())

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return int(self._world.Get_rank())

    def set_global_rank(self, rank: int) -> None: ...

    def local_rank(self) -> int:
        return self._place[0]

    def node_rank(self) -> int:
        return self._place[1]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        check_world_size(self.world_size(), num_devices, num_nodes, "mpirun")

    @cached_property
    def _place(self) -> tuple[int, int]:
        """Local rank and node rank. Hosts are numbered in the order of their names."""
        here = socket.gethostname()
        names = self._world.gather(here, root=0)
        hosts = self._world.bcast(sorted(set(names)) if names is not None else None, root=0)
        node_rank = hosts.index(here)
        return int(self._world.Split(color=node_rank).Get_rank()), node_rank


def _mpi() -> Any:
    """The module mpi4py.MPI, which starts MPI when it is imported; None where it, or MPI itself, is not there."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: mpi4py is there, and finds no MPI library
        return None
    return MPI
