"""bf16 mixed precision, accumulated gradients, and validation on an exponential moving average of the weights.

python examples/averaged_weights.py [--max_epochs N] [--precision bf16-mixed]
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
from lit_fast.callbacks import EMAWeightAveraging


class Classifier(L.LightningModule):
    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digit = batch
        loss = F.cross_entropy(self.net(pixels), digit)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pixels, digit = batch
        self.log("val_accuracy", (self.net(pixels).argmax(dim=1) == digit).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=12)
    parser.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args(argv)

    L.seed_everything(1)
    digits = load_digits()
    pixels, digit = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, val = TensorDataset(pixels[:1500], digit[:1500]), TensorDataset(pixels[1500:], digit[1500:])
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        precision=options.precision,
        accumulate_grad_batches=2,  # batches of 16, an optimizer step every 32 samples
        gradient_clip_val=1.0,
        callbacks=[EMAWeightAveraging(decay=0.95)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), DataLoader(train, 16, shuffle=True), DataLoader(val, 300))
    print(trainer.explain())
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
