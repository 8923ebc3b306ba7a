"""The same MLP, deeper: windows of four micro-batches, gradients clipped, a learning rate that changes each step.

lit-fast profile -m profiling.accumulation --against eager
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lit_fast as L
from profiling import common
from profiling.mlp import MLP


class Deep(MLP):
    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), *layers, nn.Linear(64, 10))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    L.seed_everything(1)
    data = common.loader(torch.randn(6400, 32), torch.randint(10, (6400,)), batch_size=32)
    common.trainer(accumulate_grad_batches=4, gradient_clip_val=1.0).fit(Deep(), data)
