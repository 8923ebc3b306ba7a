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


def test_a_checkpoint_holds_the_same_numbers() -> None:
    class Compares(lit_fast.Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            held, loop = checkpoint["loops"]["fit_loop"], trainer.fit_loop.epoch_loop
            steps = held["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
            assert steps["total"] == {"ready": trainer.global_step, "completed": trainer.global_step}
            batches = held["epoch_loop.batch_progress"]
            assert batches["is_last_batch"] == trainer.is_last_batch
            for name, number in batches["total"].items():
                assert number == getattr(loop.batch_progress.total, name)
            seen.append((*batches["current"].values(), held["epoch_progress"]["current"]["started"]))

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer._checkpoint_connector.dump_checkpoint()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer._checkpoint_connector.dump_checkpoint()

    seen: list[tuple[int, ...]] = []
    fitted(Plain(), batches(2), max_epochs=1, callbacks=Compares())
    # ready, completed, started, processed; epochs begun
    assert seen == [(1, 0, 0, 0, 1), (1, 0, 1, 1, 1), (2, 1, 1, 1, 1), (2, 1, 2, 2, 1)]
