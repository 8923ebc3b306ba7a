"""The callbacks and loggers together in real fits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_fast import LightningModule, Trainer
from lit_fast.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichModelSummary,
    RichProgressBar,
    Timer,
)
from lit_fast.loggers import CSVLogger


class Worsens(LightningModule):
    """Its validation loss is 0 in epoch 1 and grows by one with every epoch after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", abs(self.current_epoch - 1.0), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_early_stopping_checkpoints_and_loggers_agree(tmp_path: Path) -> None:
    best = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.1f}", save_last="link")
    stop, timer, rates = EarlyStopping("val_loss", patience=2), Timer(), LearningRateMonitor("epoch")
    trainer = Trainer(
        max_epochs=9,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path),
        callbacks=[best, stop, timer, rates],
    )
    loader = DataLoader(torch.randn(8, 2), 4)
    trainer.fit(Worsens(), loader, loader)

    assert trainer.current_epoch == 4 and stop.stopped_epoch == 3
    checkpoints = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["epoch=1-val_loss=0.0.ckpt", "last.ckpt"]
    assert best.best_model_score == 0.0 and best.best_model_path == str(checkpoints / "epoch=1-val_loss=0.0.ckpt")
    assert timer.time_elapsed("train") > timer.time_elapsed("validate") > 0
    assert rates.lrs == {"lr-SGD": [0.1] * 4}
    with open(checkpoints.parent / "metrics.csv", newline="") as file:
        values = [row["val_loss"] for row in csv.DictReader(file) if row["val_loss"]]
    assert values == ["1.0", "0.0", "1.0", "2.0"]

    again = ModelCheckpoint(monitor="val_loss", dirpath=checkpoints)
    resumed = Trainer(max_epochs=3, accelerator="cpu", logger=False, callbacks=[again])
    resumed.fit(Worsens(), loader, loader, ckpt_path=best.best_model_path)
    assert again.best_model_score == 0.0 and again.best_model_path == best.best_model_path


def test_a_default_trainer_has_bar_summary_and_checkpoints_and_none_watches_a_step(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    kinds = {type(callback) for callback in trainer.callbacks}
    assert kinds == {ModelCheckpoint, RichProgressBar, RichModelSummary}
    per_step = {name for callback in trainer.callbacks for name in callback.live_hooks(trainer) if "batch" in name}
    assert per_step == set()
    assert not any(callback.reads_gradients for callback in trainer.callbacks)
