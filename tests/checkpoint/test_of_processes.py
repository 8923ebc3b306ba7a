"""Checkpoints of several processes: one file, everybody's random state and place in the data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import rows
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_fast

pytestmark = pytest.mark.dist


class Noisy(lit_fast.LightningModule):
    """Draws in every step, in each process other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        torch.manual_seed(self.trainer.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, steps: int, resume: bool, accumulate: int) -> Any:
    model = Noisy()
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    path = folder / "half.ckpt"
    trainer.fit(model, DataLoader(rows(96), batch_size=4, shuffle=True), ckpt_path=path if resume else None)
    if not resume:
        trainer.save_checkpoint(folder / f"{steps}.ckpt")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model.losses, weights, float(trainer.callback_metrics["loss"]), sorted(os.listdir(folder))


def test_a_resumed_fit_of_two_processes_has_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    whole = run_ranks(fit, 2, tmp_path, 10, False, 2)
    half = run_ranks(fit, 2, tmp_path, 4, False, 2)
    (tmp_path / "4.ckpt").rename(tmp_path / "half.ckpt")
    resumed = run_ranks(fit, 2, tmp_path, 10, True, 2)
    for rank in range(2):
        assert half[rank][0] + resumed[rank][0] == whole[rank][0]
        assert all(torch.equal(resumed[rank][1][name], tensor) for name, tensor in whole[rank][1].items())
        assert resumed[rank][2] == whole[rank][2]
    assert whole[0][0] != whole[1][0]
