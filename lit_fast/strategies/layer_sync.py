"""Layers whose statistics are to be those of all processes: `Trainer(plugins=[TorchSyncBatchNorm()])`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class LayerSync(ABC):
    """Replaces layers before training and puts them back afterwards. A Trainer of one process has no need to."""

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """The model with its layers replaced."""

    @abstractmethod
    def revert(self, model: nn.Module) -> nn.Module:
        """The model as it was before `apply`."""


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """For inputs of any number of dimensions, as SyncBatchNorm takes them."""

    def _check_input_dim(self, input: torch.Tensor) -> None: ...


class TorchSyncBatchNorm(LayerSync):
    """Batch norms as torch's `SyncBatchNorm`, and back.

    Example:
        >>> sync, model = TorchSyncBatchNorm(), nn.Sequential(nn.BatchNorm1d(2))
        >>> type(sync.apply(model)[0]).__name__
        'SyncBatchNorm'
    """

    def apply(self, model: nn.Module) -> nn.Module:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Batch norms with the same parameters and statistics, for inputs of any number of dimensions."""
        if isinstance(model, nn.SyncBatchNorm):
            plain = _BatchNorm(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
            plain.__dict__.update(model.__dict__)
            return plain
        for name, child in model.named_children():
            setattr(model, name, self.revert(child))
        return model
