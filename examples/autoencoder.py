"""Compress digits to two numbers; log reconstructions to TensorBoard; load the best checkpoint and decode with it.

python examples/autoencoder.py [--max_epochs N]     (then: tensorboard --logdir logs)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lit_fast as L
from lit_fast.callbacks import ModelCheckpoint
from lit_fast.loggers import TensorBoardLogger


class AutoEncoder(L.LightningModule):
    def __init__(self, latent_dim: int = 2, width: int = 128, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decoder(self.encoder(pixels))

    def training_step(self, pixels: Tensor, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(pixels), pixels)
        self.log("train_mse", loss)
        return loss

    def validation_step(self, pixels: Tensor, batch_idx: int) -> None:
        self.log("val_mse", F.mse_loss(self(pixels), pixels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)


class Reconstructions(L.Callback):
    """Writes digits, and below them what is left of them, at the end of every epoch."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            pairs = torch.stack([self.pixels, pl_module(self.pixels.to(pl_module.device)).cpu()])
        image = pairs.view(2, -1, 8, 8).permute(0, 2, 1, 3).reshape(1, 16, -1)  # two rows of digits
        trainer.logger.experiment.add_image("reconstructions", image.clamp(0, 1), trainer.global_step)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=30)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    train, val = pixels[:1500], pixels[1500:]
    best = ModelCheckpoint(monitor="val_mse")
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        logger=TensorBoardLogger("logs", name="autoencoder"),
        callbacks=[best, Reconstructions(val[:10])],
        log_every_n_steps=10,
    )
    trainer.fit(AutoEncoder(), DataLoader(train, 32, shuffle=True), DataLoader(val, 300))

    model = AutoEncoder.load_from_checkpoint(best.best_model_path).eval()
    with torch.no_grad():
        error = F.mse_loss(model(val), val).item()
    return {"val_mse": error, "variance": val.var(dim=0, unbiased=False).mean().item()}


if __name__ == "__main__":
    print(main())
