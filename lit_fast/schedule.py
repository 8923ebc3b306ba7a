"""When something but the next step is due in a fit: rows for the loggers, validation, a limit, the end of a window."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from lit_fast.errors import MisconfigurationException
from lit_fast.plan import Plans
from lit_fast.progress import NOW
from lit_fast.strategies.control import Wish

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

# Optimizer steps between two times that processes ask each other whether to stop, where that neither travels with the
# gradients nor `log_every_n_steps` says how often.
ASK_OTHERS = 50


class Schedule:
    """Limits and intervals of a fit, held against its counters. It decides nothing by itself: the loop asks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.progress = trainer._progress
        self.max_epochs = trainer.config.max_epochs
        self.min_epochs = trainer.config.min_epochs
        self.max_steps = trainer.config.max_steps
        self.min_steps = trainer.config.min_steps
        self.plans: Plans | None = None
        self.val_check_batch: int | float | None = None  # known with the data; None stays where time decides
        self.last_validation = 0.0  # seconds of the monotonic clock
        self._cut_short = False  # this epoch ended without its last batches, and without a step for its open window

    # -- windows of accumulated gradients

    def windows_completed(self, batches: int | None = None) -> int:
        """Windows that ended in an optimizer step so far, which is what the loggers call the step; `batches` of this
        epoch are counted, all up to the present one where it is None."""
        progress = self.progress
        done = progress.batch_idx + 1 if batches is None else batches
        if self.plans is not None and not self.plans.trains:
            return progress.stepped_before
        window = self.plans.window if self.plans is not None and self.plans.automatic else 1
        last = self.trainer.is_last_batch and done == progress.batch_idx + 1 and not self._cut_short
        return progress.stepped_before + (math.ceil(done / window) if last else done // window)

    def _window_is_open(self) -> bool:
        assert self.plans is not None
        if not self.plans.trains:
            return True
        done = self.progress.batch_idx + 1
        return self.plans.automatic and not self.trainer.is_last_batch and done % self.plans.window != 0

    def _should_accumulate(self) -> bool:
        """Lightning's name, for callbacks: whether the running batch only gathers gradients."""
        return self._window_is_open()

    # -- the next visit

    @property
    def _asks_others(self) -> bool:
        """Whether processes have to ask each other between steps, since nothing travels with their gradients."""
        strategy = self.trainer.strategy
        return strategy.control is not None and not strategy.rides

    def _next_boundary(self) -> int:
        """The next batch after which something but a step may be due."""
        assert self.plans is not None
        trainer, progress = self.trainer, self.progress
        if trainer._should_stop or trainer._interrupt is not None or not self.plans.automatic:
            return NOW
        if any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs):
            return NOW
        done, window = progress.batch_idx + 1, self.plans.window
        candidates: list[int] = [progress.total - 1] if progress.total is not None else []

        def after_steps(steps: int) -> int:
            return (done // window + steps) * window - 1

        every = trainer.config.log_every_n_steps
        if self._asks_others:
            every = every or ASK_OTHERS
        if every and (trainer.loggers or trainer.strategy.control is not None):  # where all of them come
            candidates.append(after_steps(every - self.windows_completed() % every))
        if self.max_steps != -1:
            candidates.append(after_steps(max(1, self.max_steps - progress.global_step)))
        interval = self.val_check_batch
        if trainer.enable_validation and interval is None and self._looks_at_clock:
            return NOW  # after every batch
        if trainer.enable_validation and isinstance(interval, int):
            counted = self._validation_count()
            candidates.append(done + interval - counted % interval - 1)
        return min(candidates, default=done + 1_000_000)

    # -- validation

    def _val_check_batch(self) -> int | float | None:
        interval, total = self.trainer.config.val_check_interval, self.progress.total
        if self.trainer.config.val_check_seconds is not None:
            return None
        if isinstance(interval, int):
            by_epoch = self.trainer.config.check_val_every_n_epoch is not None
            if total is not None and interval > total and by_epoch and self.trainer.enable_validation:
                raise MisconfigurationException(
                    f"Trainer(val_check_interval={interval}) is more than the {total} batches of an epoch, so it "
                    f"would never validate; use at most {total}, limit_val_batches=0, or "
                    f"check_val_every_n_epoch=None to count batches across epochs."
                )
            return interval
        if total is None:
            if interval == 1.0:
                return math.inf
            raise MisconfigurationException(
                f"Trainer(val_check_interval={interval!r}) is a fraction, but the training data has no length; give a "
                f"number of batches (int), a time, or 1.0."
            )
        return max(1, int(total * interval))

    def _validation_count(self) -> int:
        """Batches that `val_check_interval` counts: of this epoch, or of all of them."""
        progress = self.progress
        across = self.trainer.config.check_val_every_n_epoch is None
        return progress.batch_idx + 1 + (progress.total_before if across else 0)

    def skips_validation(self) -> bool:
        """Whether `check_val_every_n_epoch` leaves this epoch out."""
        every = self.trainer.config.check_val_every_n_epoch
        return every is not None and (self.progress.epoch + 1) % every != 0

    def _validation_is_due(self, stopping: bool) -> bool:
        if not self.trainer.enable_validation or self.skips_validation():
            return False
        if stopping:
            return True
        if self.val_check_batch is None:
            return self._validation_time_is_up()
        interval = self.trainer.config.val_check_interval
        if self.val_check_batch == math.inf or (isinstance(interval, float) and interval == 1.0):
            return self.progress.is_last_batch
        return self._validation_count() % int(self.val_check_batch) == 0

    @property
    def _looks_at_clock(self) -> bool:
        """Whether this process decides by its clock; of several the first one does, and the others hear of it."""
        shared = self.trainer._shared
        return shared is None or self.trainer.is_global_zero or shared.knows(Wish.VALIDATE)

    def _validation_time_is_up(self) -> bool:
        trainer, shared = self.trainer, self.trainer._shared
        seconds = trainer.config.val_check_seconds
        is_up = seconds is not None and time.monotonic() - self.last_validation >= seconds
        if shared is None:
            return is_up
        if is_up and trainer.is_global_zero:
            shared.wish(Wish.VALIDATE)
        return shared.knows(Wish.VALIDATE)

    # -- the end

    def _steps_reached(self) -> bool:
        return self.max_steps != -1 and self.progress.global_step >= self.max_steps

    def _epochs_reached(self) -> bool:
        return self.max_epochs not in (None, -1) and self.progress.epoch >= self.max_epochs

    def _may_stop(self) -> bool:
        """Whether the minimum of epochs and steps is reached; a stop asked for earlier waits for it."""
        enough_epochs = not self.min_epochs or self.progress.epoch >= self.min_epochs
        return enough_epochs and (not self.min_steps or self.progress.global_step >= self.min_steps)

    def _finished(self) -> bool:
        return self._steps_reached() or self._epochs_reached() or (self.trainer._should_stop and self._may_stop())
