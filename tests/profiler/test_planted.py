"""Runs with a fault that was planted: each is the first finding, with its line, file or rank."""

from __future__ import annotations

import inspect
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, fitted
from ranks import run_ranks
from torch.utils.data import DataLoader, Dataset

import lit_fast
from lit_fast.callbacks import ModelCheckpoint
from lit_fast.profiler import DeepProfiler, StepProfiler
from lit_fast.profiler.merge import merge, of_profiles
from lit_fast.profiler.record import Finding, Profile
from lit_fast.profiler.report.findings import find

STEPS = 60


class Samples(Dataset[torch.Tensor]):
    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait  # s

    def __len__(self) -> int:
        return STEPS * 4

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.wait)
        return torch.randn(8)


class Model(Plain):
    """Steps long enough for what every run has some of not to count."""

    reads = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        time.sleep(0.004)
        if self.reads:
            for _ in range(40):
                loss.item()
        return loss


class Slow(lit_fast.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.003)


def first(model: Any = None, samples: Samples | None = None, profiler: Any = None, **options: Any) -> Finding:
    profiler = profiler or StepProfiler(show=False)
    loader = DataLoader(samples or Samples(), batch_size=4)
    fitted(model or Model(), loader, max_epochs=1, profiler=profiler, **options)
    return find(of_profiles([profiler.profile()]))[0]


def line_of(owner: Any) -> str:
    return f"{Path(__file__).name}:{inspect.getsourcelines(owner)[1]}"


def test_a_slow_loader() -> None:
    found = first(samples=Samples(0.002))
    assert "data loader" in found.title and line_of(Samples.__getitem__) in str(found)


def test_a_slow_hook() -> None:
    found = first(callbacks=[Slow()])
    assert "on_train_batch_end" in str(found) and line_of(Slow.on_train_batch_end) in str(found)


def test_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def slowly(fd: int) -> None:
        time.sleep(0.05)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slowly)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1)
    found = first(callbacks=[save], enable_checkpointing=True)
    assert "checkpoint" in found.title and str(tmp_path) in str(found)


def test_a_hidden_item() -> None:
    model = Model()
    model.reads = True
    found = first(model, profiler=DeepProfiler(skip=2, window=2))
    lines, begin = inspect.getsourcelines(Model.training_step)
    read = next(begin + n for n, line in enumerate(lines) if "item()" in line)
    assert f"{Path(__file__).name}:{read}" in str(found)


class OfFour(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 2:
            time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def of_four(folder: str) -> Profile:
    profiler = StepProfiler(folder, show=False)
    fitted(OfFour(), DataLoader(Samples(), batch_size=2), strategy="ddp", devices=4, max_epochs=1, profiler=profiler)
    return profiler.profile()


@pytest.mark.dist
@pytest.mark.slow
def test_a_slow_rank_of_four(tmp_path: Path) -> None:
    run_ranks(of_four, 4, str(tmp_path))
    found = find(merge(tmp_path))[0]
    assert found.rank == 2 and "2" in found.title
