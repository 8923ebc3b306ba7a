"""Lightning's names for types that programs write in their annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_fast.optim.configure import LRSchedulerConfig

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
OptimizerLRScheduler: TypeAlias = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfig]]
    | Mapping[str, Any]
    | None
)
TRAIN_DATALOADERS: TypeAlias = Iterable[Any]
EVAL_DATALOADERS: TypeAlias = Iterable[Any] | Sequence[Iterable[Any]]
EPOCH_OUTPUT: TypeAlias = list[STEP_OUTPUT]

__all__ = [
    "EPOCH_OUTPUT",
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "LRSchedulerConfig",
    "LRSchedulerTypeUnion",
    "OptimizerLRScheduler",
]
