"""A GAN learns a ring of eight Gaussians: two optimizers, stepped by hand.

python examples/gan.py [--max_epochs N]     (most samples land on the ring after ten seconds)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lit_fast as L

RADIUS = 2.0


def ring(samples: int) -> Tensor:
    """Points of shape (samples, 2) around eight centres on a circle."""
    angle = torch.randint(8, (samples,)) * (math.pi / 4)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.1 * torch.randn(samples, 2)


def mlp(inputs: int, outputs: int, width: int = 64) -> nn.Sequential:
    hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class GAN(L.LightningModule):
    def __init__(self, latent_dim: int = 8, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = mlp(latent_dim, 2)
        self.discriminator = mlp(2, 1)

    def forward(self, samples: int) -> Tensor:
        return self.generator(torch.randn(samples, self.hparams.latent_dim, device=self.device))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        generator_step, discriminator_step = self.optimizers()

        # Softplus of the negated logit is the cross-entropy against the label "real".
        with self.toggled_optimizer(generator_step):
            loss = F.softplus(-self.discriminator(self(len(real)))).mean()
            generator_step.zero_grad()
            self.manual_backward(loss)
            generator_step.step()
        self.log("generator_loss", loss, prog_bar=True)

        with self.toggled_optimizer(discriminator_step):
            fake = self(len(real)).detach()
            loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
            discriminator_step.zero_grad()
            self.manual_backward(loss)
            discriminator_step.step()
        self.log("discriminator_loss", loss, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            distance = (self(1000).norm(dim=1) - RADIUS).abs()
        self.log("distance_to_ring", distance.mean(), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        halves = (self.generator, self.discriminator)
        return [torch.optim.Adam(half.parameters(), self.hparams.learning_rate, betas=(0.5, 0.999)) for half in halves]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=40)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    loader = DataLoader(TensorDataset(ring(8000)), batch_size=128, shuffle=True)
    trainer = L.Trainer(max_epochs=options.max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(GAN(), loader)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
