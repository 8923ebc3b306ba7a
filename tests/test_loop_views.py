"""What programs write into the counters of a fit; what they read is compared in test_hook_order."""

from __future__ import annotations

from typing import Any

import pytest
from heart_models import Plain, batches, fitted, trainer

import lit_fast


def test_an_epoch_that_was_set_is_gone_on_from() -> None:
    class GoesOn(lit_fast.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.fit_loop.epoch_progress.current.processed = 4
            trainer.fit_loop.epoch_progress.current.completed = 4

    made = fitted(Plain(), batches(2), max_epochs=5, callbacks=GoesOn())
    assert (made.current_epoch, made.global_step) == (5, 2)
    assert made.fit_loop.epoch_progress.total.completed == 5
    made.fit_loop.epoch_progress.reset()
    assert made.current_epoch == 0


def test_a_step_that_was_set_is_gone_on_from() -> None:
    class GoesOn(lit_fast.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 10
            loop._batches_that_stepped = 10

    made = fitted(Plain(), batches(3), max_steps=12, callbacks=GoesOn())
    loop = made.fit_loop.epoch_loop
    assert (made.global_step, loop.automatic_optimization.optim_progress.optimizer_steps) == (12, 12)
    assert (loop._batches_that_stepped, loop.batch_idx) == (12, 1)


def test_limits_may_be_written_on_the_loops() -> None:
    made = fitted(Plain(), batches(3), max_epochs=1)
    made.fit_loop.max_epochs = 3
    made.fit(made.lightning_module, batches(3))
    assert (made.current_epoch, made.global_step, made.max_epochs) == (3, 9, 3)
    made.fit_loop.max_epochs, made.fit_loop.epoch_loop.max_steps, made.fit_loop.epoch_loop.min_steps = -1, 11, 2
    assert (made.max_steps, made.min_steps, made.fit_loop.done) == (11, 2, False)
    made.fit(made.lightning_module, batches(3))
    assert made.global_step == 11 and made.fit_loop.done


def test_what_only_the_loop_counts_cannot_be_set() -> None:
    progress = trainer().fit_loop.epoch_loop.batch_progress
    with pytest.raises(AttributeError, match="'ready' of this progress follows from what the loop does"):
        progress.current.ready = 3
    assert repr(progress).startswith("total: ready=0, started=0, processed=0, completed=0; current: ready=0")
