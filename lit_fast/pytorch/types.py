"""Lightning's names for types that programs write in their annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, runtime_checkable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_fast.optim.configure import LRSchedulerConfig

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau


@runtime_checkable
class Steppable(Protocol):
    """What can step: an optimizer, or what stands in for one."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any: ...


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """What has an optimizer's groups and state, too."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: dict[Any, Any]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler and when it steps, as `configure_optimizers` may return it."""

    scheduler: LRSchedulerTypeUnion
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """An optimizer by itself."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict, total=False):
    """An optimizer and its scheduler."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType
    monitor: str


OptimizerLRScheduler: TypeAlias = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfig]]
    | Mapping[str, Any]
    | None
)
TRAIN_DATALOADERS: TypeAlias = Iterable[Any]
EVAL_DATALOADERS: TypeAlias = Iterable[Any] | Sequence[Iterable[Any]]
LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]
CollectibleGroup: TypeAlias = Any  # torch.distributed's group, which a torch without it does not have
EPOCH_OUTPUT: TypeAlias = list[STEP_OUTPUT]
LRSchedulerPLType: TypeAlias = LRSchedulerTypeUnion
_PATH: TypeAlias = str | Path
_DEVICE: TypeAlias = torch.device | str | int
_MAP_LOCATION_TYPE: TypeAlias = _DEVICE | Callable[[Any, str], Any] | dict[Any, Any] | None
_METRIC: TypeAlias = Tensor | float
_EVALUATE_OUTPUT: TypeAlias = list[Mapping[str, float]]
_PREDICT_OUTPUT: TypeAlias = list[Any] | list[list[Any]]
_PRECISION_INPUT: TypeAlias = int | str | None
_LITERAL_WARN: TypeAlias = Literal["warn"]
_OUT_DICT: TypeAlias = dict[str, Tensor]
_PBAR_DICT: TypeAlias = dict[str, float]

__all__ = [
    "EPOCH_OUTPUT",
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "CollectibleGroup",
    "DistributedDataParallel",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerType",
    "LRSchedulerTypeTuple",
    "LRSchedulerTypeUnion",
    "Optimizable",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
    "Steppable",
]
