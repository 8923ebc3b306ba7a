"""Accumulate gradients over more or fewer batches from a given epoch on."""

from __future__ import annotations

import warnings
from typing import Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.module import LightningModule


class GradientAccumulationScheduler(Callback):
    """Sets `trainer.accumulate_grad_batches` at the start of every epoch.

    Args:
        scheduling: batches per optimizer step, by the epoch (from 0) from which on that holds. 1 before the first.

    Raises:
        MisconfigurationException: an empty schedule, an epoch below 0, or a number of batches below 1; manual
            optimization; a Trainer with `accumulate_grad_batches` of its own.

    Example::

        Trainer(callbacks=[GradientAccumulationScheduler({0: 8, 4: 4, 8: 1})])
    """

    reads_gradients = False

    def __init__(self, scheduling: dict[int, int]) -> None:
        super().__init__()
        if not scheduling:
            raise MisconfigurationException(
                "GradientAccumulationScheduler needs a schedule {epoch: batches}, such as {4: 2}; it was given none."
            )
        epochs = [epoch for epoch in scheduling if not isinstance(epoch, int) or epoch < 0]
        counts = [count for count in scheduling.values() if not isinstance(count, int) or count < 1]
        if epochs or counts:
            wrong, allowed = (epochs[0], "an epoch, an int from 0") if epochs else (counts[0], "batches, an int from 1")
            raise MisconfigurationException(
                f"GradientAccumulationScheduler({scheduling}): {wrong!r} stands where {allowed}, belongs."
            )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates."""
        return any(batches > 1 for batches in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Batches per optimizer step in `epoch`."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientAccumulationScheduler has no effect in manual optimization; leave it out and step the "
                "optimizer every so many batches in training_step."
            )
        given = trainer.config.accumulate_grad_batches
        if given != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={given}) contradicts GradientAccumulationScheduler; leave one out."
            )
        rare = [n for n in ("optimizer_step", "optimizer_zero_grad") if is_overridden(n, pl_module, LightningModule)]
        if rare and self.going_to_accumulate_grad_batches():
            warnings.warn(
                f"{type(pl_module).__name__} overrides {' and '.join(rare)}, which run once an optimizer step, not "
                f"after every batch, where gradients are accumulated.",
                stacklevel=2,
            )
        self._set(trainer)  # a fit that goes on inside an epoch does not start that epoch again

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._set(trainer)

    def _set(self, trainer: Any) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
