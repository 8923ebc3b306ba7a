"""Functions of Lightning's utilities: numbers against torch, and what they refuse."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_fast
from lit_fast.errors import MisconfigurationException
from lit_fast.pytorch import requirements
from lit_fast.pytorch.functions import (
    find_shared_parameters,
    grad_norm,
    is_overridden,
    load_hparams_from_yaml,
    save_hparams_to_yaml,
    set_shared_parameters,
    suggested_max_num_workers,
)


@pytest.mark.parametrize("norm_type", [1, 2.0, "inf"])
def test_grad_norm(norm_type: float | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    model[:2](torch.randn(5, 3)).sum().backward()
    total = nn.utils.get_total_norm([p.grad for p in model[:2].parameters()], float(norm_type))
    norms = grad_norm(model, norm_type, group_separator=".")
    kind = float(norm_type)
    assert list(norms) == [
        *(f"grad_{kind}_norm.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")),
        f"grad_{kind}_norm_total",
    ]
    assert torch.equal(norms[f"grad_{kind}_norm_total"], total)
    assert torch.equal(norms[f"grad_{kind}_norm.0.bias"], model[0].bias.grad.norm(kind))


def test_grad_norm_without_gradients_and_of_nothing() -> None:
    assert grad_norm(nn.Linear(2, 2), 2) == {}
    with pytest.raises(MisconfigurationException, match="norm_type=0"):
        grad_norm(nn.Linear(2, 2), 0)


def test_is_overridden() -> None:
    class Module(lit_fast.LightningModule):
        def training_step(self, batch: object, batch_idx: int) -> None: ...

    assert is_overridden("training_step", Module())
    assert not is_overridden("validation_step", Module())
    assert not is_overridden("training_step")
    assert is_overridden("forward", nn.Identity(), parent=nn.Module)
    with pytest.raises(MisconfigurationException, match="pass as `parent`"):
        is_overridden("forward", nn.Identity())
    with pytest.raises(MisconfigurationException, match="no_such_method"):
        is_overridden("no_such_method", Module())


def test_shared_parameters_come_apart_and_together_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert find_shared_parameters(model) == []
    model[1][0].weight = model[0].weight
    shared = find_shared_parameters(model)
    assert shared == [["0.weight", "1.0.weight"]]
    model[1][0].weight = nn.Parameter(torch.zeros(2, 2))
    assert set_shared_parameters(model, shared) is model
    assert model[1][0].weight is model[0].weight


def test_suggested_workers_leave_a_core_to_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [suggested_max_num_workers(n) for n in (1, 4, 16, 32)] == [15, 3, 1, 1]
    with pytest.raises(MisconfigurationException, match="local_world_size=0"):
        suggested_max_num_workers(0)


def test_hyperparameters_go_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hparams.yaml"
    assert load_hparams_from_yaml(path) == {}
    save_hparams_to_yaml(path, argparse.Namespace(lr=0.1, sizes=[1, 2], dtype=torch.float32))
    assert load_hparams_from_yaml(path) == {"lr": 0.1, "sizes": [1, 2], "dtype": "torch.float32"}


def test_flags_of_installed_packages() -> None:
    assert requirements._TORCH_AVAILABLE
    assert not requirements._NO_SUCH_PACKAGE_AVAILABLE
    with pytest.raises(AttributeError, match="_TORCH_GREATER"):
        _ = requirements._TORCH_GREATER
