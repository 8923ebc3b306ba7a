"""Processes that we start ourselves, or one alone: `Trainer(plugins=[LightningEnvironment()])`."""

from __future__ import annotations

import os
import socket

from lit_fast.errors import ClusterError
from lit_fast.rank_zero import rank_zero_only
from lit_fast.strategies.environments.cluster_environment import (
    ClusterEnvironment,
    check_world_size,
    int_variable,
)

_READER = "LightningEnvironment reads it, and whoever starts the processes sets it"


class LightningEnvironment(ClusterEnvironment):
    """The default: this process, and those that a launcher of ours starts. Read from the variables that launchers set.

    On several nodes the program is started once on each, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.

    Example:
        >>> environment = LightningEnvironment()
        >>> environment.set_world_size(4)
        >>> environment.world_size(), environment.creates_processes_externally
        (4, False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._main_port = -1
        self._world_size, self._global_rank = 1, 0

    @property
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in os.environ

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT, or a free port, the same at each call."""
        if self._main_port < 0:
            self._main_port = int_variable("MASTER_PORT", _READER, default=0) or find_free_network_port()
        return self._main_port

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        self._world_size = size

    def global_rank(self) -> int:
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def local_rank(self) -> int:
        return int_variable("LOCAL_RANK", _READER, default=0)

    def node_rank(self) -> int:
        return int_variable("NODE_RANK" if "NODE_RANK" in os.environ else "GROUP_RANK", _READER, default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise where the nodes could not find each other, or the processes that are there are not those asked for.

        Raises:
            ClusterError: on several nodes NODE_RANK, MASTER_ADDR or MASTER_PORT is missing; NODE_RANK is out of
                bounds; a launcher started another number of processes.
        """
        if self.creates_processes_externally:
            if "WORLD_SIZE" in os.environ:
                check_world_size(int_variable("WORLD_SIZE", _READER), num_devices, num_nodes, "the launcher")
            return
        if num_nodes == 1:
            return
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing == ["NODE_RANK"] and "GROUP_RANK" in os.environ:
            missing = []
        if missing:
            raise ClusterError(
                f"Trainer(num_nodes={num_nodes}): {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. "
                f"Start the program on each node with NODE_RANK=0 to {num_nodes - 1}, and with the same MASTER_ADDR (a "
                f"name or address of node 0) and MASTER_PORT (a free port of it); or use `lit-fast launch`, torchrun "
                f"or a cluster's own command."
            )
        if not 0 <= self.node_rank() < num_nodes:
            raise ClusterError(
                f"NODE_RANK={self.node_rank()} with Trainer(num_nodes={num_nodes}): allowed are 0 to {num_nodes - 1}."
            )

    def teardown(self) -> None:
        os.environ.pop("WORLD_SIZE", None)


def find_free_network_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
