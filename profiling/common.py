"""What the programs here share: a Trainer that prints and saves nothing, and random data."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import lit_fast as L


def trainer(**options: Any) -> L.Trainer:
    """At most 20,000 micro-batches; `lit-fast profile` takes as many as it needs."""
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    return L.Trainer(**{"max_epochs": 100, "limit_train_batches": 200, **quiet, **options})


def loader(*tensors: torch.Tensor, batch_size: int) -> DataLoader[Any]:
    """Their rows in a new order each epoch."""
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True, drop_last=True)


def tokens(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """(rows, length + 1) int64; batches of it are what the models of lit_fast.models take."""
    return torch.randint(vocabulary, (rows, length + 1))
