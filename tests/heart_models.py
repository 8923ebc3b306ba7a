"""Small modules, data and hand-written loops that the tests of the trainer's heart share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_fast

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def batches(count: int, size: int = 4, width: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator) for _ in range(count)]


def rows(count: int, width: int = 8, seed: int = 1) -> TensorDataset:
    return TensorDataset(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def shuffled(count: int, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows(count), batch_size=batch_size, shuffle=True, **options)


def network(width: int = 8) -> nn.Sequential:
    """The same weights whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 1))


class Plain(lit_fast.LightningModule):
    """Overrides nothing but the two hooks that a module needs."""

    def __init__(self, optimizer: Callable[[Iterator[nn.Parameter]], Any] | None = None) -> None:
        super().__init__()
        self.net = network()
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        return (self.net(batch).squeeze(-1) - batch.sum(-1)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class NoLength:
    """Batches without a length."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def trainer(**options: Any) -> lit_fast.Trainer:
    return lit_fast.Trainer(**{**QUIET, **options})


def fitted(model: Any, data: Any, val: Any = None, **options: Any) -> lit_fast.Trainer:
    made = trainer(**options)
    made.fit(model, data, val)
    return made
