"""Predict batch by batch and write each batch to a file as soon as it is there, so that nothing piles up in memory.

python examples/predict_to_files.py [--max_epochs N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lit_fast as L
from lit_fast.callbacks import BasePredictionWriter


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digit = batch
        return F.cross_entropy(self.net(pixels), digit)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


class Writer(BasePredictionWriter):
    """Files of (index in the data, predicted digit)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        torch.save({"index": torch.tensor(batch_indices), "digit": prediction}, self.folder / f"{batch_idx:05d}.pt")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("predictions"))
    options = parser.parse_args(argv)

    L.seed_everything(1)
    digits = load_digits()
    pixels, digit = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = Classifier()
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[Writer(options.folder)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(pixels[:1500], digit[:1500]), 32, shuffle=True))
    held_out = DataLoader(TensorDataset(pixels[1500:], digit[1500:]), batch_size=50)
    trainer.predict(model, held_out, return_predictions=False)

    files = sorted(options.folder.glob("*.pt"))
    written = [torch.load(file, weights_only=True) for file in files]
    index = torch.cat([part["index"] for part in written])
    right = torch.cat([part["digit"] for part in written]) == digit[1500:][index]
    return {"files": len(files), "predictions": len(index), "accuracy": right.float().mean().item()}


if __name__ == "__main__":
    print(main())
