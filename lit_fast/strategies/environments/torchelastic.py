"""Processes that torchrun started."""

from __future__ import annotations

import os

import torch.distributed

from lit_fast.rank_zero import rank_zero_warn
from lit_fast.strategies.environments.cluster_environment import ExternalEnvironment, int_variable


class TorchElasticEnvironment(ExternalEnvironment):
    """torchrun (torch.distributed.run), on one node or several, restarts included.

    Example::

        # torchrun --nproc-per-node 4 train.py
        Trainer(devices=4, strategy="ddp")  # detected
    """

    started_by = "torchrun"

    @property
    def main_address(self) -> str:
        """MASTER_ADDR; this machine, with a warning, where it is not set."""
        return _default("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT; 12910, with a warning, where it is not set."""
        _default("MASTER_PORT", "12910")
        return self.number("MASTER_PORT")

    @staticmethod
    def detect() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()

    def node_rank(self) -> int:
        return int_variable("GROUP_RANK", "TorchElasticEnvironment reads it, and torchrun sets it", default=0)


def _default(name: str, value: str) -> str:
    if name not in os.environ:
        rank_zero_warn(f"{name} is not set, though torchrun sets it; {value} is taken.")
        os.environ[name] = value
    return os.environ[name]
