"""LearningRateMonitor: names, intervals, momentum and weight decay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_standins import StandInTrainer

from lit_fast.callbacks import LearningRateMonitor
from lit_fast.errors import MisconfigurationException


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


class Sink:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def scheduled(optimizer: torch.optim.Optimizer, interval: str, name: str | None = None) -> Any:
    return SimpleNamespace(scheduler=SimpleNamespace(optimizer=optimizer), interval=interval, name=name)


def run(tmp_path: Path, monitor: LearningRateMonitor, **options: Any) -> list[tuple[int, dict[str, float]]]:
    sink = Sink()
    trainer = StandInTrainer(tmp_path, loggers=[sink], log_every_n_steps=2, **options)
    trainer.callback_metrics = {}
    monitor.on_train_start(trainer, None)
    monitor.on_train_epoch_start(trainer, None)
    for batch_idx in range(4):
        trainer.fit_loop.epoch_loop._batches_that_stepped = batch_idx
        monitor.on_train_batch_start(trainer, None, None, batch_idx)
    newest = {name: value for _, row in sink.rows for name, value in row.items()}
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == pytest.approx(newest, rel=1e-6)
    return sink.rows


def test_names_of_optimizers_groups_and_schedulers(tmp_path: Path) -> None:
    sgd = torch.optim.SGD([parameter()], lr=0.1)
    named = torch.optim.SGD([{"params": [parameter()], "name": "head"}, {"params": [parameter()]}], lr=0.2)
    adam = torch.optim.Adam([parameter()], lr=0.3, betas=(0.8, 0.9))
    rows = run(
        tmp_path,
        LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True, log_key_prefix="opt/"),
        optimizers=[sgd, named, adam],
        lr_scheduler_configs=[scheduled(adam, "epoch", "warm")],
    )
    assert rows == [
        (
            0,
            {
                "opt/warm": 0.3, "opt/warm-momentum": 0.8, "opt/warm-weight_decay": 0,
                "opt/lr-SGD": 0.1, "opt/lr-SGD-momentum": 0, "opt/lr-SGD-weight_decay": 0,
                "opt/lr-SGD-1/head": 0.2, "opt/lr-SGD-1/head-momentum": 0,
                "opt/lr-SGD-1/head-weight_decay": 0,
                "opt/lr-SGD-1/pg2": 0.2, "opt/lr-SGD-1/pg2-momentum": 0, "opt/lr-SGD-1/pg2-weight_decay": 0,
            },
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "scheduler", "steps"),
    [(None, "epoch", [0]), (None, "step", [2, 4]), ("step", "epoch", [2, 4]), ("epoch", "step", [0])],
)
def test_intervals(tmp_path: Path, interval: Any, scheduler: str, steps: list[int]) -> None:
    adam = torch.optim.Adam([parameter()], lr=0.3)
    monitor = LearningRateMonitor(interval)
    rows = run(tmp_path, monitor, optimizers=[adam], lr_scheduler_configs=[scheduled(adam, scheduler)])
    assert rows == [(step, {"lr-Adam": 0.3}) for step in steps]
    assert monitor.lrs == {"lr-Adam": [0.3] * len(steps)}


def test_a_step_hook_is_live_only_where_steps_are_logged() -> None:
    assert "on_train_batch_start" in LearningRateMonitor().live_hooks()
    assert "on_train_batch_start" not in LearningRateMonitor("epoch").live_hooks()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="'minute'"):
        LearningRateMonitor("minute")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="logger"):
        LearningRateMonitor().on_train_start(StandInTrainer(tmp_path), None)
    twice = torch.optim.SGD([{"params": [parameter()], "name": "a"}, {"params": [parameter()], "name": "a"}], lr=1)
    with pytest.raises(MisconfigurationException, match="'a'"):
        run(tmp_path, LearningRateMonitor(), optimizers=[twice])
