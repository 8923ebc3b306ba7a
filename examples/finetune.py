"""Pretrain a backbone on the digits 0 to 4, then fine-tune it on 5 to 9: frozen first, thawed half way.

python examples/finetune.py [--max_epochs N]
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
from lit_fast.callbacks import BackboneFinetuning


class Classifier(L.LightningModule):
    def __init__(self, backbone: nn.Module | None = None, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone or nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(F.relu(self.backbone(pixels)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digit = batch
        return F.cross_entropy(self(pixels), digit)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pixels, digit = batch
        self.log("val_accuracy", (self(pixels).argmax(dim=1) == digit).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # What is frozen stays out; the callback adds it as a parameter group when it is thawed.
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.hparams.learning_rate)


def loaders(first_digit: int, train_rows: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Training and validation data of five digits, counted from `first_digit`."""
    pixels, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    wanted = (digits >= first_digit) & (digits < first_digit + 5)
    pixels, digits = pixels[wanted].float() / 16, digits[wanted] - first_digit
    train, val = ((pixels[rows], digits[rows]) for rows in (slice(train_rows), slice(train_rows, None)))
    return DataLoader(TensorDataset(*train), 20, shuffle=True), DataLoader(TensorDataset(*val), 256)


def fit(model: L.LightningModule, *data: object, **options: object) -> float:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, **options)
    trainer.fit(model, *data)
    return trainer.callback_metrics["val_accuracy"].item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=40)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    pretrained = Classifier()
    before = fit(pretrained, *loaders(0, train_rows=700), max_epochs=5)

    few = loaders(5, train_rows=40)
    tuning = BackboneFinetuning(options.max_epochs // 2, backbone_initial_ratio_lr=0.1)
    tuned = fit(Classifier(pretrained.backbone), *few, max_epochs=options.max_epochs, callbacks=[tuning])
    scratch = fit(Classifier(), *few, max_epochs=options.max_epochs)
    return {"pretrained": before, "fine_tuned": tuned, "from_scratch": scratch}


if __name__ == "__main__":
    print(main())
