"""A small GAN: two optimizers, stepped in training_step.

lit-fast profile -m profiling.manual_optimization --against eager
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lit_fast as L
from profiling import common


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


class GAN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(8, 2), mlp(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        generator_step, discriminator_step = self.optimizers()
        fake = self.generator(torch.randn(len(real), 8, device=self.device))

        self.toggle_optimizer(generator_step)
        loss = F.softplus(-self.discriminator(fake)).mean()
        generator_step.zero_grad()
        self.manual_backward(loss)
        generator_step.step()
        self.untoggle_optimizer(generator_step)
        self.log("generator_loss", loss)

        self.toggle_optimizer(discriminator_step)
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        discriminator_step.zero_grad()
        self.manual_backward(loss)
        discriminator_step.step()
        self.untoggle_optimizer(discriminator_step)
        self.log("discriminator_loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        halves = (self.generator, self.discriminator)
        return [torch.optim.Adam(half.parameters(), 1e-4, betas=(0.5, 0.999)) for half in halves]


if __name__ == "__main__":
    L.seed_everything(1)
    common.trainer().fit(GAN(), common.loader(torch.randn(25_600, 2), batch_size=128))
