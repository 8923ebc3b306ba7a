"""An MLP of two small layers on batches of 32: the model takes little, so what is around it rules.

lit-fast profile -m profiling.mlp --against eager
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lit_fast as L
from profiling import common


class MLP(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    L.seed_everything(1)
    data = common.loader(torch.randn(6400, 32), torch.randint(10, (6400,)), batch_size=32)
    common.trainer().fit(MLP(), data)
