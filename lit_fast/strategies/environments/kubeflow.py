"""Processes that Kubeflow's training operator started, one a pod."""

from __future__ import annotations

import os
from typing import NoReturn

from lit_fast.errors import ClusterError
from lit_fast.strategies.environments.cluster_environment import ExternalEnvironment


class KubeflowEnvironment(ExternalEnvironment):
    """A PyTorchJob of Kubeflow's: each process is a pod, and so a node, of its own.

    Its variables are those of other launchers too, so that it cannot be told from them: pass it.

    Example::

        Trainer(devices=1, num_nodes=4, strategy="ddp", plugins=[KubeflowEnvironment()])
    """

    started_by = "Kubeflow's PyTorchJob"

    @property
    def main_address(self) -> str:
        if "MASTER_ADDR" not in os.environ:
            raise ClusterError("The environment variable MASTER_ADDR is not set; Kubeflow sets it in each pod.")
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return self.number("MASTER_PORT")

    @staticmethod
    def detect() -> NoReturn:
        """Raises, as Lightning's does.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "KubeflowEnvironment cannot be detected, for its variables are those of other launchers too: pass "
            "Trainer(plugins=[KubeflowEnvironment()])."
        )

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()
