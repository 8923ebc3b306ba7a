"""Classify scikit-learn's handwritten digits; keep the best epoch, stop when nothing improves, test what was kept.

python examples/digits_classifier.py [--max_epochs N]     (96% of the test digits in a few seconds)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import lit_fast as L
from lit_fast.callbacks import EarlyStopping, ModelCheckpoint

Batch = tuple[Tensor, Tensor]


class Digits(L.LightningDataModule):
    """1,797 grey images of 8 x 8 pixels, split 1,200 / 297 / 300."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        whole = TensorDataset(images, torch.tensor(digits.target))
        self.train, self.val, self.test = random_split(whole, [1200, 297, 300], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, batch_size=100)

    def test_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.test, batch_size=100)


class Classifier(L.LightningModule):
    def __init__(self, channels: int = 16, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(images), digits)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("test", batch)

    def score(self, stage: str, batch: Batch) -> None:
        images, digits = batch
        logits = self(images)
        accuracy = (logits.argmax(dim=1) == digits).float().mean()
        self.log_dict({f"{stage}_loss": F.cross_entropy(logits, digits), f"{stage}_accuracy": accuracy}, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=20)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    best = ModelCheckpoint(monitor="val_accuracy", mode="max", filename="digits-{epoch}-{val_accuracy:.3f}")
    patience = EarlyStopping(monitor="val_loss", patience=3)
    trainer = L.Trainer(max_epochs=options.max_epochs, callbacks=[best, patience])
    trainer.fit(Classifier(), datamodule=Digits())
    return trainer.test(ckpt_path="best", datamodule=Digits())[0]


if __name__ == "__main__":
    print(main())
