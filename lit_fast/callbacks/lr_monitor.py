"""Log learning rates, and on request momentum and weight decay, of every optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from lit_fast.callbacks._logging_steps import training_logs
from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException


class LearningRateMonitor(Callback):
    """Sends `lr-<optimizer class>` to the loggers: a second optimizer of one class gets "-1", parameter
    groups "/pg1" or "/<name of the group>". A scheduler's own `name` takes the place of the whole.

    Args:
        logging_interval: "step", "epoch", or None: as often as each scheduler steps.
        log_momentum: also `<name>-momentum` (of Adam: beta1).
        log_weight_decay: also `<name>-weight_decay`.
        log_key_prefix: put before every name.

    Attributes:
        lrs: every rate logged so far, by name.

    Raises:
        MisconfigurationException: another interval; a Trainer without logger; two parameter groups of one
            name.

    Example::

        Trainer(callbacks=[LearningRateMonitor(logging_interval="step")])
    """

    reads_gradients = False

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
        log_key_prefix: str | None = None,
    ) -> None:
        super().__init__()
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): allowed: None, 'step', 'epoch'."
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.log_key_prefix = log_key_prefix or ""
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}

    def live_hooks(self, trainer: Any = None) -> set[str]:
        unused = {"epoch": ["on_train_batch_start"], "step": ["on_train_epoch_start"]}.get(
            self.logging_interval or "", []
        )
        return self._without(super().live_hooks(trainer), LearningRateMonitor, *unused)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.loggers:
            raise MisconfigurationException("LearningRateMonitor needs a logger; the Trainer has logger=False.")
        groups = [(name, group) for _, group, name in self._groups(trainer)]
        if self.log_momentum and any("momentum" not in g and "betas" not in g for _, g in groups):
            warnings.warn(
                "LearningRateMonitor(log_momentum=True): an optimizer has no momentum; 0 is logged for it.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.lrs = {name: [] for name, _ in groups}
        self.last_momentum_values = {f"{name}-momentum": None for name, _ in groups}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name, _ in groups}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.logging_interval != "epoch" and training_logs(trainer, batch_idx):
            # The rate of the step that is about to run stands in one row with what that step logs.
            self._log(trainer, "step" if self.logging_interval is None else None, steps_ahead=1)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch" if self.logging_interval is None else None)

    def _log(self, trainer: Any, interval: str | None, steps_ahead: int = 0) -> None:
        values: dict[str, float] = {}
        for scheduled, group, name in self._groups(trainer):
            if interval is None or scheduled is None or scheduled == interval:
                values.update(self._values(name, group))
        if values:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            step = trainer.fit_loop.epoch_loop._batches_that_stepped + steps_ahead
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def _values(self, name: str, group: dict[str, Any]) -> dict[str, float]:
        values = {name: float(group["lr"])}
        if name not in self.lrs:
            # an optimizer that had one group has got more: what was logged of it belongs to the first
            self.lrs[name] = self.lrs.pop(name.removesuffix("/pg1"), [])
        self.lrs[name].append(values[name])
        if self.log_momentum:
            momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
            values[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
        if self.log_weight_decay:
            decay = group["weight_decay"]
            values[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        return values

    def _groups(self, trainer: Any) -> Iterator[tuple[str | None, dict[str, Any], str]]:
        """Every parameter group: the interval of its scheduler or None, the group, its metric's name."""
        seen: list[Optimizer] = []
        counts: dict[type[Optimizer], int] = {}
        scheduled = [(config.scheduler.optimizer, config) for config in trainer.lr_scheduler_configs]
        unscheduled = [(getattr(optimizer, "optimizer", optimizer), None) for optimizer in trainer.optimizers]
        for optimizer, config in [*scheduled, *unscheduled]:
            if config is None and any(optimizer is other for other in seen):
                continue
            seen.append(optimizer)
            kind = type(optimizer)
            given = config.name if config is not None else None
            if given is None:
                counts[kind] = counts.get(kind, 0) + 1
            name = f"{self.log_key_prefix}{given or f'lr-{kind.__name__}'}"
            if counts.get(kind, 0) > 1:
                name += f"-{counts[kind] - 1}"
            for group, suffix in zip(optimizer.param_groups, _suffixes(name, optimizer), strict=True):
                yield (config.interval if config is not None else None), group, name + suffix


def _suffixes(name: str, optimizer: Optimizer) -> list[str]:
    groups = optimizer.param_groups
    if len(groups) == 1:
        own = groups[0].get("name")
        return [f"/{own}" if own else ""]
    names = [str(group.get("name", f"pg{i}")) for i, group in enumerate(groups, start=1)]
    twice = sorted({own for own in names if names.count(own) > 1})
    if twice:
        raise MisconfigurationException(
            f"LearningRateMonitor: {name} has two parameter groups named {twice[0]!r}; name each its own."
        )
    return [f"/{own}" for own in names]
