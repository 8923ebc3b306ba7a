"""Processes that LSF's `jsrun` started."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from lit_fast.errors import ClusterError
from lit_fast.strategies.environments.cluster_environment import ExternalEnvironment, int_variable

_READER = "LSFEnvironment reads it, and LSF sets it for what `jsrun` starts"


class LSFEnvironment(ExternalEnvironment):
    """A job of IBM's LSF, whose processes the job step manager (`jsrun`) starts.

    Nodes are those of the file that LSB_DJOB_RANKFILE names, but its first, from which the job is launched.

    Raises:
        ClusterError: that file, or the job's number, is missing.
    """

    started_by = "jsrun"
    world_size_variable = "JSM_NAMESPACE_SIZE"
    global_rank_variable = "JSM_NAMESPACE_RANK"
    local_rank_variable = "JSM_NAMESPACE_LOCAL_RANK"

    def __init__(self) -> None:
        super().__init__()
        hosts, here = _hosts(), socket.gethostname()
        if here not in hosts:
            raise ClusterError(
                f"This host, {here!r}, is not among the hosts in LSB_DJOB_RANKFILE ({', '.join(hosts)}); start the "
                f"program with `jsrun` in the job."
            )
        self._main_address, self._node_rank = hosts[0], hosts.index(here)
        os.environ["MASTER_ADDR"] = self._main_address
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(10000 + int_variable("LSB_JOBID", _READER) % 1000)
        self._main_port = int_variable("MASTER_PORT", _READER)

    @property
    def main_address(self) -> str:
        return self._main_address

    @property
    def main_port(self) -> int:
        """MASTER_PORT, or made of the job's number, so that every process finds the same: 10000 to 10999."""
        return self._main_port

    @staticmethod
    def detect() -> bool:
        return {"LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"} <= set(os.environ)

    def node_rank(self) -> int:
        return self._node_rank


def _hosts() -> list[str]:
    """Each compute node once, in the order of the rank file."""
    name = os.environ.get("LSB_DJOB_RANKFILE")
    if not name:
        raise ClusterError(f"The environment variable LSB_DJOB_RANKFILE is {'empty' if name == '' else 'not set'}; "
                           f"{_READER}.")  # fmt: skip
    try:
        lines = Path(name).read_text().split()
    except OSError as error:
        raise ClusterError(f"LSB_DJOB_RANKFILE={name!r} cannot be read ({error.strerror}); {_READER}.") from error
    if len(lines) < 2:
        raise ClusterError(f"LSB_DJOB_RANKFILE={name!r} lists no compute node; {_READER}.")
    return list(dict.fromkeys(lines[1:]))
