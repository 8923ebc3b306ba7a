"""The place of a process in its job, against Lightning's answers; and layers that are shared."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

import lightning_environments
import pytest
import torch
from torch import nn

import lit_fast
from lit_fast.demos import BoringModel
from lit_fast.errors import ClusterError, MisconfigurationException, PossibleUserWarning
from lit_fast.rank_zero import rank_zero_only
from lit_fast.strategies.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    detect_environment,
)
from lit_fast.strategies.layer_sync import TorchSyncBatchNorm

STARTED = ("SLURM_", "LSB_", "JSM_", "TORCHELASTIC_", "OMPI_", "PMI_", "MASTER_")
PLACES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(STARTED) or name in PLACES:
            monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def environ(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "environments_lightning_2_6_6.json").read_text())


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    before = dict(os.environ)
    try:
        return lightning_environments.record("lit_fast")
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_answers_are_lightnings(ours: dict[str, Any]) -> None:
    """But where a variable is missing, which is a ClusterError and not a KeyError, and for numbers that do not fit."""
    assert set(GOLDEN) == set(ours) and len(GOLDEN) > 20
    for case in set(GOLDEN) - {"first nodes"}:
        for name, theirs in GOLDEN[case].items():
            if name.startswith("fits"):
                continue
            same = {"raises KeyError": "raises ValueError", "raises RuntimeError": "raises ValueError"}
            assert ours[case][name] == same.get(theirs, theirs), f"{case}: {name}"
    wrong = "n[7,9]-x[1-2]"  # Lightning's answer, n7, is no host of that list
    assert ours["first nodes"] == {**GOLDEN["first nodes"], wrong: "n7-x1"}


@pytest.mark.parametrize(
    ("case", "nodes", "world_size"),
    [("torchrun", 0, 8), ("slurm", 2, 8), ("lsf", 0, 4), ("kubeflow", 0, 3), ("slurm, one task", 0, 1)],
)
def test_numbers_that_do_not_fit(ours: dict[str, Any], case: str, nodes: int, world_size: int) -> None:
    """Refused wherever the product is not the number of processes, and wherever Lightning refuses them."""
    for devices, num_nodes in lightning_environments.SETTINGS:
        fits = devices * num_nodes == world_size and nodes in (0, num_nodes)
        name = f"fits {devices} x {num_nodes}"
        assert ours[case][name] == (None if fits else "raises ValueError")
        assert GOLDEN[case][name] is None or not fits


def test_errors_say_what_to_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ(monkeypatch, **lightning_environments.SLURM)
    with pytest.raises(
        ClusterError, match=r"devices=2\), and the SLURM job has --ntasks-per-node=4; set devices=4, or"
    ):
        SLURMEnvironment().validate_settings(2, 4)
    with pytest.raises(ClusterError, match=r"num_nodes=3\), and the SLURM job has --nodes=2; set num_nodes=2, or"):
        SLURMEnvironment().validate_settings(4, 3)
    monkeypatch.setenv("SLURM_LOCALID", "one")
    with pytest.raises(
        ClusterError, match="SLURM_LOCALID is 'one', no whole number; SLURMEnvironment reads it, and sr"
    ):
        SLURMEnvironment().local_rank()
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ClusterError, match=r"has --ntasks=8, .* --ntasks-per-node=8"):
        SLURMEnvironment()
    environ(monkeypatch, **lightning_environments.TORCHRUN)
    with pytest.raises(
        ClusterError,
        match=r"devices=3, num_nodes=2\) needs 6 processes, and torchrun started 8; set devices=4, or start 3",
    ):
        TorchElasticEnvironment().validate_settings(3, 2)
    with pytest.raises(ClusterError, match="started 8; set another num_nodes"):
        TorchElasticEnvironment().validate_settings(3, 3)
    monkeypatch.delenv("RANK")
    with pytest.raises(ClusterError, match="RANK is not set; TorchElasticEnvironment reads it, and torchrun sets it"):
        TorchElasticEnvironment().global_rank()
    hosts = tmp_path / "hosts"
    hosts.write_text("launcher\nsomewhere\n")
    monkeypatch.setenv("LSB_DJOB_RANKFILE", str(hosts))
    with pytest.raises(
        ClusterError, match=f"'{socket.gethostname()}', is not among .* \\(somewhere\\); start .* `jsrun`"
    ):
        LSFEnvironment()
    with pytest.raises(NotImplementedError, match=r"pass Trainer\(plugins=\[KubeflowEnvironment"):
        KubeflowEnvironment.detect()
    with pytest.raises(ModuleNotFoundError, match="pip install mpi4py"):
        MPIEnvironment()


def test_nodes_that_could_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    LightningEnvironment().validate_settings(2, 1)
    with pytest.raises(
        ClusterError, match=r"NODE_RANK, MASTER_ADDR, MASTER_PORT are not set\. Start the program on each"
    ):
        LightningEnvironment().validate_settings(2, 2)
    environ(monkeypatch, MASTER_ADDR="a", MASTER_PORT=1, NODE_RANK=2)
    with pytest.raises(ClusterError, match=r"NODE_RANK=2 with Trainer\(num_nodes=2\): allowed are 0 to 1"):
        LightningEnvironment().validate_settings(2, 2)
    monkeypatch.setenv("NODE_RANK", "1")
    LightningEnvironment().validate_settings(2, 2)
    environ(monkeypatch, LOCAL_RANK=1, WORLD_SIZE=4)
    LightningEnvironment().validate_settings(2, 2)
    with pytest.raises(ClusterError, match="needs 8 processes, and the launcher started 4; set devices=2"):
        LightningEnvironment().validate_settings(4, 2)


def test_srun_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text("")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    with pytest.warns(PossibleUserWarning, match=r"srun did not start .* `srun python[\d.]* train.py --lr 1`\."):
        assert isinstance(detect_environment(), LightningEnvironment)


def test_the_signal_of_a_requeue() -> None:
    assert SLURMEnvironment().requeue_signal == signal.SIGUSR1 and SLURMEnvironment().auto_requeue
    asked = SLURMEnvironment(auto_requeue=False, requeue_signal=signal.SIGHUP)
    assert asked.requeue_signal == signal.SIGHUP and not asked.auto_requeue


class Communicator:
    """MPI's, of process `rank` of those on `hosts`; what others would send is worked out."""

    def __init__(self, hosts: list[str], rank: int) -> None:
        self.hosts, self.rank = hosts, rank

    def Get_size(self) -> int:
        return len(self.hosts)

    def Get_rank(self) -> int:
        return self.rank

    def gather(self, value: Any, root: int) -> list[str] | None:
        return self.hosts if self.rank == root else None

    def bcast(self, value: Any, root: int) -> Any:
        return value if self.rank == root else sorted(set(self.hosts)) if value is None else self.hosts[0]

    def Split(self, color: int) -> Communicator:
        mine = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]
        return Communicator([self.hosts[rank] for rank in mine], mine.index(self.rank))


@pytest.mark.parametrize(("rank", "local_rank", "node_rank"), [(0, 0, 1), (1, 0, 0), (2, 1, 1), (3, 1, 0)])
def test_mpi(monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, node_rank: int) -> None:
    hosts = ["b", "a", "b", "a"]
    world = Communicator(hosts, rank)
    package = types.ModuleType("mpi4py")
    package.MPI = types.SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setattr(socket, "gethostname", lambda: hosts[rank])
    here = detect_environment()
    assert isinstance(here, MPIEnvironment) and here.creates_processes_externally
    assert (here.world_size(), here.global_rank(), here.local_rank(), here.node_rank()) == (
        4,
        rank,
        local_rank,
        node_rank,
    )
    assert here.main_address == "b"
    if rank == 0:
        assert 0 < here.main_port < 65536 and here.main_port == here.main_port
    here.validate_settings(2, 2)
    with pytest.raises(ClusterError, match="mpirun started 4"):
        here.validate_settings(4, 2)
    monkeypatch.setattr(world, "hosts", ["b"])
    assert not MPIEnvironment.detect()


def test_a_process_alone() -> None:
    here = LightningEnvironment()
    assert (here.main_address, here.world_size(), here.global_rank(), here.local_rank(), here.node_rank()) == (
        "127.0.0.1", 1, 0, 0, 0,
    )  # fmt: skip
    assert 0 < here.main_port < 65536 and here.main_port == here.main_port
    assert not here.creates_processes_externally and LightningEnvironment.detect()


def test_a_process_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "first", "MASTER_PORT": "8", "LOCAL_RANK": "1", "GROUP_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    here = LightningEnvironment()
    assert (here.main_address, here.main_port, here.local_rank(), here.node_rank()) == ("first", 8, 1, 2)
    assert here.creates_processes_externally
    monkeypatch.setenv("NODE_RANK", "5")
    here.set_world_size(8)
    here.set_global_rank(3)
    assert (here.node_rank(), here.world_size(), here.global_rank(), rank_zero_only.rank) == (5, 8, 3, 3)


def test_one_of_ones_own_has_to_be_whole() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ClusterEnvironment()  # type: ignore[abstract]


def test_a_trainer_takes_both() -> None:
    trainer = lit_fast.Trainer(
        plugins=[LightningEnvironment(), TorchSyncBatchNorm()], accelerator="cpu", barebones=True, max_steps=1
    )
    trainer.fit(BoringModel())
    assert trainer.global_step == 1
    with pytest.raises(MisconfigurationException, match="was given str; allowed so far"):
        lit_fast.Trainer(plugins=["ddp"], accelerator="cpu")


def test_batch_norms_go_to_shared_ones_and_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(3)))
    weight, sync = model[0].weight, TorchSyncBatchNorm()
    shared = sync.apply(model)
    assert isinstance(shared[0], nn.SyncBatchNorm) and isinstance(shared[1][0], nn.SyncBatchNorm)
    plain = sync.revert(shared)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in plain.modules())
    assert plain[0].weight is weight and plain[1][0].num_features == 3
    x = torch.randn(4, 2)
    assert torch.equal(plain[0](x), nn.BatchNorm1d(2)(x))
