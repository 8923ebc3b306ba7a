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
    with pytest.raises(AttributeError, match="where a run is in its data cannot be set; go on from a checkpoint"):
        progress.current.ready = 3
    zeroings = trainer().fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad
    with pytest.raises(AttributeError, match="'started' of this progress follows from what the loop does"):
        zeroings.total.started = 3
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


def test_what_is_written_between_epochs_is_gone_on_from() -> None:
    """In any order, and by Lightning's load_state_dict."""

    class Writes(lit_fast.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            loop.batch_progress.current.reset()
            loop.batch_progress.total.ready = 20
            loop.batch_progress.total.completed = 20
            assert (loop.total_batch_idx, loop.batch_idx) == (19, -1)
            epochs = {"ready": 2, "completed": 2, "started": 2, "processed": 2}
            trainer.fit_loop.epoch_progress.load_state_dict({"total": epochs, "current": epochs})
            loop.automatic_optimization.optim_progress.optimizer.step.total.increment_by(7)

    made = fitted(Plain(), batches(3), max_epochs=3, callbacks=Writes())
    loop = made.fit_loop.epoch_loop
    assert (made.current_epoch, made.global_step, loop.total_batch_idx) == (3, 10, 22)
    loop.batch_progress.reset()
    loop.automatic_optimization.optim_progress.reset()
    loop.scheduler_progress.reset()
    assert (loop.batch_idx, loop.total_batch_idx, made.global_step) == (-1, -1, 0)


def test_steps_written_inside_an_epoch_move_its_end() -> None:
    class Writes(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
                steps.total.completed = 8
                with pytest.raises(AttributeError, match="can only be reset, between two epochs"):
                    trainer.fit_loop.epoch_loop.batch_progress.current.reset()

    made = fitted(Plain(), batches(6), max_steps=10, callbacks=Writes())
    assert made.global_step == 10 and made.fit_loop.batch_idx == 3


def test_counters_of_an_evaluation_may_be_reset_between_runs() -> None:
    class Tests(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            with pytest.raises(AttributeError, match="of a loop cannot be set while it runs"):
                self.trainer.test_loop.batch_progress.current.completed = 5

    made = trainer()
    made.test(Tests(), batches(3), verbose=False)
    progress = made.test_loop.batch_progress
    assert (progress.total.completed, progress.current.completed, progress.is_last_batch) == (3, 3, True)
    progress.reset()
    assert (progress.total.ready, progress.current.ready, progress.is_last_batch) == (0, 0, False)
    made.test(made.lightning_module, batches(2), verbose=False)
    assert (progress.total.completed, progress.current.completed) == (2, 2)
