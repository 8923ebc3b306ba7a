"""How a process learns its place among the others of a job: `Trainer(plugins=[LightningEnvironment()])`."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod

from lit_fast.rank_zero import rank_zero_only


class ClusterEnvironment(ABC):
    """What starts the processes of a job, and numbers them. Subclass it for a cluster of your own.

    A Trainer on one device accepts one and asks it nothing, for its process is the only one.
    """

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether something else starts the processes."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Where the first process listens."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """The port that it listens on."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Whether this process was started so."""

    @abstractmethod
    def world_size(self) -> int:
        """How many processes there are."""

    @abstractmethod
    def set_world_size(self, size: int) -> None: ...

    @abstractmethod
    def global_rank(self) -> int:
        """The number of this process among all, from 0."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None: ...

    @abstractmethod
    def local_rank(self) -> int:
        """The number of this process on its machine, from 0."""

    @abstractmethod
    def node_rank(self) -> int:
        """The number of this machine, from 0."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:  # noqa: B027  (nothing to compare here)
        """Raise where the Trainer was told other numbers than the job has."""

    def teardown(self) -> None:  # noqa: B027  (most have nothing to give back)
        """The end of a run."""


class LightningEnvironment(ClusterEnvironment):
    """The default: this process, and those that a strategy starts. Read from the variables that launchers set.

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
            self._main_port = int(os.environ.get("MASTER_PORT", "0")) or find_free_network_port()
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
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))

    def teardown(self) -> None:
        os.environ.pop("WORLD_SIZE", None)


def find_free_network_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
