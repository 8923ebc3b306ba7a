"""The rule by which callbacks tell whether they log now; the same as the Trainer's."""

from __future__ import annotations

from typing import Any


def training_logs(trainer: Any, batch_idx: int) -> bool:
    """Whether the optimizer step that the running training batch belongs to is one that is logged."""
    if batch_idx <= trainer._progress.boundary - trainer.accumulate_grad_batches:
        return False  # the loop looks after a row no later than at its boundary; most steps end here, after 0.2 us
    every = trainer.log_every_n_steps
    if not every:
        return False
    due = (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
    return due or bool(trainer.should_stop)


def evaluation_logs(trainer: Any, batches: int) -> bool:
    """Whether batch number `batches` (from 1, over all loaders) of a validation, test or prediction is logged."""
    every = trainer.log_every_n_steps
    return bool(every) and (batches % every == 0 or bool(trainer.should_stop))
