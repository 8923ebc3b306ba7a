"""What `configure_optimizers` may return, brought into one shape: a list of optimizers and a list of schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_fast.errors import MisconfigurationException

_FORMS = "an optimizer, a list of optimizers, ([optimizers], [schedulers]), or {'optimizer': ..., 'lr_scheduler': ...}"


@dataclass
class LRSchedulerConfig:
    """When one scheduler steps, by Lightning's field names.

    `interval` is "epoch" or "step" (optimizer steps), `frequency` counts them, `monitor` names the logged value that
    a plateau scheduler watches, `strict` makes its absence an error.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


def parse_optimizers(returned: Any, automatic: bool) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Sort out one return value of `configure_optimizers`.

    Raises:
        MisconfigurationException: a form, key or value that is not allowed, or several optimizers under automatic
            optimization.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[LRSchedulerConfig] = []
    if returned is None:
        return optimizers, schedulers
    if isinstance(returned, list | tuple) and len(returned) == 2 and all(isinstance(p, list | tuple) for p in returned):
        optimizers = list(returned[0])
        schedulers = [_scheduler(item, None, automatic) for item in returned[1]]
    else:
        entries = list(returned) if isinstance(returned, list | tuple) else [returned]
        for entry in entries:
            if isinstance(entry, Mapping):
                _add_entry(entry, optimizers, schedulers, automatic)
            else:
                optimizers.append(entry)
    for optimizer in optimizers:
        if not _is_optimizer(optimizer):
            raise MisconfigurationException(
                f"configure_optimizers returned {type(optimizer).__name__} where an optimizer belongs; "
                f"allowed: {_FORMS}."
            )
    if automatic and len(optimizers) > 1:
        raise MisconfigurationException(
            f"configure_optimizers returned {len(optimizers)} optimizers; automatic optimization takes one. Set "
            f"self.automatic_optimization = False and step them in training_step."
        )
    for config in schedulers:
        if not any(getattr(config.scheduler, "optimizer", None) is optimizer for optimizer in optimizers):
            raise MisconfigurationException(
                "configure_optimizers returned a scheduler of an optimizer that it did not return; return both."
            )
    return optimizers, schedulers


def _add_entry(
    entry: Mapping[str, Any], optimizers: list[Optimizer], schedulers: list[LRSchedulerConfig], automatic: bool
) -> None:
    if "optimizer" not in entry:
        raise MisconfigurationException(
            f"configure_optimizers returned a dict with the keys {sorted(map(str, entry))}; allowed are 'optimizer', "
            f"'lr_scheduler' and 'monitor', the first one needed."
        )
    _warn_of_unused("A dict of configure_optimizers", entry, ("optimizer", "lr_scheduler", "monitor", "frequency"))
    optimizers.append(entry["optimizer"])
    if entry.get("lr_scheduler") is not None:
        schedulers.append(_scheduler(entry["lr_scheduler"], entry.get("monitor"), automatic))


def _scheduler(item: Any, monitor: str | None, automatic: bool) -> LRSchedulerConfig:
    if isinstance(item, LRSchedulerConfig):
        return item
    if not isinstance(item, Mapping):
        item = {"scheduler": item}
    known = {row.name for row in fields(LRSchedulerConfig)}
    if "scheduler" not in item:
        raise MisconfigurationException(
            f"An lr_scheduler dict has the keys {sorted(map(str, item))}; 'scheduler' is needed, allowed besides: "
            f"{', '.join(sorted(known - {'scheduler'}))}."
        )
    _warn_of_unused("An lr_scheduler dict", item, known)
    config = LRSchedulerConfig(**{"monitor": monitor, **{name: item[name] for name in known if name in item}})
    if isinstance(config.scheduler, ReduceLROnPlateau):
        config.reduce_on_plateau = True
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
            "A ReduceLROnPlateau scheduler needs the name of the logged value that it watches: "
            "{'scheduler': ..., 'monitor': 'val_loss'}."
        )
    return config


def _warn_of_unused(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    unused = sorted(str(key) for key in given if key not in known)
    if unused:
        warnings.warn(
            f"{what} has the keys {unused}, which nothing reads; allowed are {', '.join(sorted(known))}.",
            category=RuntimeWarning,
            stacklevel=2,
        )


def _is_optimizer(candidate: Any) -> bool:
    return isinstance(candidate, Optimizer) or (hasattr(candidate, "step") and hasattr(candidate, "param_groups"))
