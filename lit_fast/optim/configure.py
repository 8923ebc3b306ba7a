"""What `configure_optimizers` may return, brought into one shape: a list of optimizers and a list of schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lit_fast.errors import MisconfigurationException, MisconfigurationRuntimeError, MisconfigurationTypeError
from lit_fast.optim.lightning_optimizer import LightningOptimizer

_FORMS = "an optimizer, a list of optimizers, ([optimizers], [schedulers]), or {'optimizer': ..., 'lr_scheduler': ...}"


@dataclass
class LRSchedulerConfig:
    """When one scheduler steps, by Lightning's field names.

    `interval` is "epoch" or "step" (batches), `frequency` counts them, `monitor` names the logged value that
    a plateau scheduler watches, `strict` makes its absence an error.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


_SCHEDULER_KEYS = tuple(row.name for row in fields(LRSchedulerConfig))


class NoOptimizer(Optimizer):
    """Stands where `configure_optimizers` returned none: it has nothing to step, and its steps are counted."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {})

    def step(self, closure: Any = None) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Any) -> None: ...


def parse_optimizers(
    returned: Any, automatic: bool, own_scheduler_step: bool = False
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Sort out one return value of `configure_optimizers`.

    Args:
        automatic: whether the loop steps optimizers and schedulers, or `training_step` does.
        own_scheduler_step: whether the module overrides `lr_scheduler_step`, which schedulers with an API of their
            own need.

    Raises:
        MisconfigurationException: a form or value that is not allowed, or several optimizers under automatic
            optimization. Unknown keys are left out, with a RuntimeWarning.
    """
    optimizers: list[Any] = []
    schedulers: list[LRSchedulerConfig] = []
    if isinstance(returned, list | tuple) and len(returned) == 2 and isinstance(returned[0], list | tuple):
        optimizers, given = list(returned[0]), returned[1]
        given = given if isinstance(given, list | tuple) else [given]
        schedulers = [_scheduler(item, None, automatic) for item in given]
    elif returned is not None:
        entries = list(returned) if isinstance(returned, list | tuple) else [returned]
        for entry in entries:
            if isinstance(entry, Mapping):
                _add_entry(entry, optimizers, schedulers, automatic, single=isinstance(returned, Mapping))
            else:
                optimizers.append(entry)
    for index, optimizer in enumerate(optimizers):
        if isinstance(optimizer, LightningOptimizer):
            optimizers[index] = optimizer.optimizer
        elif not _is_optimizer(optimizer):
            raise MisconfigurationException(
                f"configure_optimizers returned {type(optimizer).__name__} where an optimizer belongs; "
                f"allowed: {_FORMS}."
            )
    if automatic and len(optimizers) > 1:
        raise MisconfigurationRuntimeError(
            f"configure_optimizers returned {len(optimizers)} optimizers; automatic optimization takes one. Set "
            f"self.automatic_optimization = False and step them in training_step."
        )
    for config in schedulers:
        _check_scheduler(config.scheduler, optimizers, automatic and not own_scheduler_step)
    return optimizers, schedulers


def _add_entry(
    entry: Mapping[str, Any],
    optimizers: list[Any],
    schedulers: list[LRSchedulerConfig],
    automatic: bool,
    single: bool,
) -> None:
    if "optimizer" not in entry:
        raise MisconfigurationException(
            f"configure_optimizers returned a dict with the keys {sorted(map(str, entry))}; allowed are 'optimizer', "
            f"'lr_scheduler' and 'monitor', the first one needed."
        )
    _warn_of_keys("configure_optimizers returned a dict", set(entry) - {"optimizer", "lr_scheduler", "monitor"})
    optimizers.append(entry["optimizer"])
    if entry.get("lr_scheduler") is not None:
        monitor = entry.get("monitor") if single else None  # of several dicts, each scheduler names its own
        schedulers.append(_scheduler(entry["lr_scheduler"], monitor, automatic))


def _scheduler(item: Any, monitor: str | None, automatic: bool) -> LRSchedulerConfig:
    if isinstance(item, LRSchedulerConfig):
        return item
    options = dict(item) if isinstance(item, Mapping) else {"scheduler": item, "monitor": monitor}
    if "scheduler" not in options:
        raise MisconfigurationException(
            f"An lr_scheduler dict has the keys {sorted(map(str, options))}; 'scheduler' is needed, allowed besides: "
            f"{', '.join(sorted(set(_SCHEDULER_KEYS) - {'scheduler'}))}."
        )
    _warn_of_keys("An lr_scheduler dict", set(options) - set(_SCHEDULER_KEYS))
    options = {key: value for key, value in options.items() if key in _SCHEDULER_KEYS}
    unused = sorted(set(options) & {"reduce_on_plateau", "monitor", "strict"})
    if not automatic and isinstance(item, Mapping) and unused:
        warnings.warn(
            f"An lr_scheduler dict has the keys {unused}, which nothing reads in manual optimization: training_step "
            f"steps the schedulers itself. Leave them out.",
            RuntimeWarning,
            stacklevel=2,
        )
    config = LRSchedulerConfig(**options)
    if "reduce_on_plateau" not in options:
        config.reduce_on_plateau = isinstance(config.scheduler, ReduceLROnPlateau)
    if config.interval not in ("step", "epoch"):
        raise MisconfigurationException(
            f"An lr_scheduler has interval={config.interval!r}; allowed are 'step' and 'epoch'."
        )
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise MisconfigurationException(
            f"An lr_scheduler has frequency={config.frequency!r}; allowed is an int of at least 1."
        )
    if config.reduce_on_plateau and config.monitor is None and automatic:
        raise MisconfigurationException(
            "A ReduceLROnPlateau scheduler needs the name of the logged value that it watches, beside it: "
            "'lr_scheduler': {'scheduler': ..., 'monitor': 'val_loss'}."
        )
    if isinstance(config.scheduler, OneCycleLR) and automatic and "interval" not in options:
        warnings.warn(
            "A OneCycleLR scheduler steps once an epoch, and its cycle is usually counted in batches; did you mean "
            "{'scheduler': ..., 'interval': 'step'}?",
            RuntimeWarning,
            stacklevel=2,
        )
    return config


def _warn_of_keys(where: str, unknown: set[Any]) -> None:
    if unknown:
        warnings.warn(
            f"{where} with keys that mean nothing: {', '.join(sorted(map(repr, unknown)))}. Leave them out.",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_scheduler(scheduler: Any, optimizers: list[Any], steps_by_api: bool) -> None:
    kind = type(scheduler).__name__
    if not any(getattr(scheduler, "optimizer", None) is optimizer for optimizer in optimizers):
        raise MisconfigurationException(
            "configure_optimizers returned a scheduler of an optimizer that it did not return; return both."
        )
    if not (callable(getattr(scheduler, "state_dict", None)) and callable(getattr(scheduler, "load_state_dict", None))):
        raise MisconfigurationTypeError(
            f"configure_optimizers returned {kind} as a scheduler, which has no state_dict() and load_state_dict(): "
            f"a checkpoint could not hold it. Give it both."
        )
    if steps_by_api and not isinstance(scheduler, LRScheduler | ReduceLROnPlateau):
        raise MisconfigurationException(
            f"configure_optimizers returned {kind} as a scheduler, which derives from none of torch's: how it steps is "
            f"unknown. Override lr_scheduler_step(self, scheduler, metric), or derive it from LRScheduler."
        )


def _is_optimizer(candidate: Any) -> bool:
    needed = ("step", "param_groups", "state", "state_dict", "load_state_dict")
    return isinstance(candidate, Optimizer) or all(hasattr(candidate, name) for name in needed)
