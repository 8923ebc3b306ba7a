"""How a process learns its place among the others of a job: one file a cluster."""

from lit_fast.strategies.environments.cluster_environment import ClusterEnvironment
from lit_fast.strategies.environments.kubeflow import KubeflowEnvironment
from lit_fast.strategies.environments.lightning import LightningEnvironment, find_free_network_port
from lit_fast.strategies.environments.lsf import LSFEnvironment
from lit_fast.strategies.environments.mpi import MPIEnvironment
from lit_fast.strategies.environments.slurm import SLURMEnvironment
from lit_fast.strategies.environments.torchelastic import TorchElasticEnvironment

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "detect_environment",
    "find_free_network_port",
]

# torchrun first, since it may run inside a job of the others; MPI last, for asking it starts it.
_DETECTED = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


def detect_environment() -> ClusterEnvironment:
    """The environment of what started this process: torchrun, SLURM, LSF, MPI, else Lightning's own.

    Raises:
        ClusterError: the cluster that is detected is not set up as it needs to be.
    """
    return next((kind() for kind in _DETECTED if kind.detect()), LightningEnvironment())
