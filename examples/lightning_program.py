"""A program written for Lightning, unedited: nothing in it knows lit_fast.

lit-fast run examples/lightning_program.py [--max_epochs N]

`python examples/lightning_program.py` runs it on Lightning itself, where that is installed, with the same losses.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Spirals(L.LightningDataModule):
    """Points (x, y) on two spirals, and on which of the two they lie."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        side = torch.randint(2, (2000,), generator=generator)
        turn = torch.rand(2000, generator=generator) * 6
        angle = turn + side * torch.pi
        points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 3
        points += 0.03 * torch.randn(2000, 2, generator=generator)
        self.train, self.val = TensorDataset(points[:1600], side[:1600]), TensorDataset(points[1600:], side[1600:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=400)


class Classifier(L.LightningModule):
    def __init__(self, width: int = 64, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        points, side = batch
        loss = F.cross_entropy(self.net(points), side)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        points, side = batch
        logits = self.net(points)
        self.log("val_loss", F.cross_entropy(logits, side))
        self.log("val_accuracy", (logits.argmax(dim=1) == side).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=15)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    best = ModelCheckpoint(monitor="val_accuracy", mode="max")
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        gradient_clip_val=1.0,
        logger=CSVLogger("logs", name="spirals"),
        callbacks=[best, EarlyStopping(monitor="val_loss", patience=5), LearningRateMonitor("step")],
        log_every_n_steps=5,
    )
    trainer.fit(Classifier(), datamodule=Spirals())
    return trainer.validate(ckpt_path=best.best_model_path, datamodule=Spirals(), verbose=False)[0]


if __name__ == "__main__":
    print(main())
