"""A small residual network on images of 32 x 32.

lit-fast profile -m profiling.cnn --against eager
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lit_fast as L
from profiling import common


class Block(nn.Module):
    """(B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(images)))
        return F.relu(self.second_norm(self.second(hidden)) + self.shortcut(images))


class CNN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.head(self.body(images)), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


if __name__ == "__main__":
    L.seed_everything(1)
    data = common.loader(torch.randn(1600, 3, 32, 32), torch.randint(10, (1600,)), batch_size=8)
    common.trainer().fit(CNN(), data)
