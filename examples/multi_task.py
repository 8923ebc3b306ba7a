"""One body, two tasks: a training loader and a validation loader for each, of different lengths.

python examples/multi_task.py [--max_epochs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lit_fast as L

Batch = tuple[Tensor, Tensor]


class TwoTasks(L.LightningModule):
    """Which digit is it, and how much ink is in it."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleDict({"digit": nn.Linear(64, 10), "ink": nn.Linear(64, 1)})

    def forward(self, task: str, pixels: Tensor) -> Tensor:
        return self.heads[task](self.body(pixels))

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        pixels, digit = batch["digit"]
        digit_loss = F.cross_entropy(self("digit", pixels), digit)
        pixels, ink = batch["ink"]
        ink_loss = F.mse_loss(self("ink", pixels).squeeze(-1), ink)
        self.log_dict({"digit_loss": digit_loss, "ink_loss": ink_loss}, prog_bar=True)
        return digit_loss + ink_loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        pixels, target = batch
        if dataloader_idx == 0:
            accuracy = (self("digit", pixels).argmax(dim=1) == target).float().mean()
            self.log("val_accuracy", accuracy, add_dataloader_idx=False, prog_bar=True)
        else:
            error = F.mse_loss(self("ink", pixels).squeeze(-1), target)
            self.log("val_ink_mse", error, add_dataloader_idx=False, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=10)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    digits = load_digits()
    pixels, digit = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    ink = pixels.sum(dim=1)
    ink = (ink - ink.mean()) / ink.std()
    train = {
        "digit": DataLoader(TensorDataset(pixels[:1200], digit[:1200]), batch_size=32, shuffle=True),
        "ink": DataLoader(TensorDataset(pixels[600:1500], ink[600:1500]), batch_size=32, shuffle=True),
    }
    val = [
        DataLoader(TensorDataset(pixels[1500:], digit[1500:]), batch_size=300),
        DataLoader(TensorDataset(pixels[1500:], ink[1500:]), batch_size=300),
    ]
    trainer = L.Trainer(max_epochs=options.max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(TwoTasks(), train, val)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
