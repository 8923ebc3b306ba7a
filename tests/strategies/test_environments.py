"""The place of a process in its job, and layers that are shared: accepted by a Trainer of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lit_fast
from lit_fast.demos import BoringModel
from lit_fast.errors import MisconfigurationException
from lit_fast.rank_zero import rank_zero_only
from lit_fast.strategies.environments import ClusterEnvironment, LightningEnvironment
from lit_fast.strategies.layer_sync import TorchSyncBatchNorm


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


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
