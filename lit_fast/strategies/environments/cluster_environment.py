"""What every cluster answers: where the first process listens, how many there are, and which one this is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

from lit_fast.errors import ClusterError


class ClusterEnvironment(ABC):
    """What starts the processes of a job, and numbers them. Subclass it for a cluster of your own."""

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
    def set_world_size(self, size: int) -> None:
        """A strategy says how many there are; clusters that know better pass over it."""

    @abstractmethod
    def global_rank(self) -> int:
        """The number of this process among all, from 0."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """A strategy says which one this is; clusters that know better pass over it."""

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


class ExternalEnvironment(ClusterEnvironment):
    """A cluster that starts every process itself and tells each its place in environment variables.

    `started_by` is the command, as messages name it; `world_size_variable` and its siblings say where each number is.
    """

    started_by = ""
    world_size_variable = "WORLD_SIZE"
    global_rank_variable = "RANK"
    local_rank_variable = "LOCAL_RANK"

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self.number(self.world_size_variable)

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return self.number(self.global_rank_variable)

    def set_global_rank(self, rank: int) -> None: ...

    def local_rank(self) -> int:
        return self.number(self.local_rank_variable)

    def number(self, name: str) -> int:
        """The environment variable `name`, a whole number.

        Raises:
            ClusterError: it is not set, or holds something else.
        """
        return int_variable(name, f"{type(self).__name__} reads it, and {self.started_by} sets it")

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        check_world_size(self.world_size(), num_devices, num_nodes, self.started_by)


def int_variable(name: str, reader: str, default: int | None = None) -> int:
    """The environment variable `name` as a number; `reader` says in the error who wants it, and who sets it.

    Raises:
        ClusterError: it is not set and there is no default, or it holds something else.
    """
    text = os.environ.get(name)
    if text is None:
        if default is not None:
            return default
        raise ClusterError(f"The environment variable {name} is not set; {reader}.")
    try:
        return int(text)
    except ValueError:
        raise ClusterError(f"The environment variable {name} is {text!r}, no whole number; {reader}.") from None


def check_world_size(world_size: int, num_devices: int, num_nodes: int, started_by: str) -> None:
    """Raise a ClusterError unless there is one process for each device of each node."""
    if num_devices * num_nodes != world_size:
        fits = f"devices={world_size // num_nodes}" if world_size % num_nodes == 0 else "another num_nodes"
        raise ClusterError(
            f"Trainer(devices={num_devices}, num_nodes={num_nodes}) needs {num_devices * num_nodes} processes, and "
            f"{started_by} started {world_size}; set {fits}, or start {num_devices} on each of {num_nodes} nodes."
        )
