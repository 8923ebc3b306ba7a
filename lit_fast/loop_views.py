"""The counters of a fit under the names that Lightning's callbacks read: `fit_loop.epoch_progress.current.completed`.

Nothing is counted here. Each number is worked out, when somebody reads it, from the few that `Progress` keeps and from
the hook that runs: a batch, say, counts as started once its `on_train_batch_start` hooks are through. What programs
write (the epoch or the step to go on from) moves what `Progress` keeps by as much. Checkpoints hold the same numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lit_fast.progress import NOW
from lit_fast.trackers import ALL, BEGUN, DONE, BatchProgressView, Namespace, ProgressView, Tracker

if TYPE_CHECKING:
    from lit_fast.evaluation import EvaluationLoop, StageLoop
    from lit_fast.loop import FitLoop
    from lit_fast.progress import Progress

# How far a training step is, by the hook that runs; hooks that are not named here are past the zeroing of gradients.
RECEIVE, BATCH_START, FORWARD, BEFORE_ZERO, ZERO, BACKWARD, STEPPED, BATCH_END = range(8)
_PLACES = {
    "on_before_batch_transfer": RECEIVE,
    "transfer_batch_to_device": RECEIVE,
    "on_after_batch_transfer": RECEIVE,
    "on_train_batch_start": BATCH_START,
    "optimizer_step": FORWARD,
    "training_step": FORWARD,
    "on_before_zero_grad": BEFORE_ZERO,
    "optimizer_zero_grad": ZERO,
    "lr_scheduler_step": STEPPED,
    "on_train_batch_end": BATCH_END,
}
# The last place where the running batch does not count yet, by what is counted.
_NOT_YET = {"ready": RECEIVE, "started": BATCH_START, "processed": STEPPED, "completed": BATCH_END}


class Counters:
    """Works the numbers out."""

    def __init__(self, loop: FitLoop) -> None:
        self.loop, self.progress = loop, loop.progress

    @property
    def place(self) -> int:
        """How far the running step is; past its end between two steps."""
        if self.progress.stage not in ("batch", "broken"):
            return BATCH_END + 1
        table = self.loop.trainer._metric_log.current
        return _PLACES.get(table.hook, BACKWARD) if table is not None else BATCH_END + 1

    @property
    def window(self) -> int:
        plans = self.loop.plans
        return plans.window if plans is not None and plans.automatic else 1

    @property
    def automatic(self) -> bool:
        return self.loop.plans is None or self.loop.plans.automatic

    def epochs(self, name: str) -> int:
        progress = self.progress
        if progress.stage == "start":
            table = self.loop.trainer._metric_log.current
            begins = table is not None and table.hook == "on_train_epoch_start"
            return progress.epoch + (begins and name == "ready")
        if name == "completed":
            return progress.epoch
        return progress.epoch + (name != "processed" or progress.stage == "epoch_end")

    def move_epoch(self, by: int) -> None:
        self.progress.epoch += by
        self.progress.boundary = NOW  # what is due next is worked out anew

    def batches(self, name: str) -> int:
        """Of the running epoch."""
        place, done = self.place, self.progress.batch_idx + 1
        return max(0, done - (place <= _NOT_YET[name]))

    def all_batches(self, name: str) -> int:
        return self.progress.total_before + self.batches(name)

    def move_batches(self, by: int) -> None:
        """Of the epoch that is over, back to 0: the total stays, and so do the windows."""
        progress, loop = self.progress, self.loop
        if progress.stage != "start" or progress.batch_idx + 1 + by:
            raise AttributeError(
                "epoch_loop.batch_progress.current can only be reset, between two epochs: where a run is in its data "
                "cannot be set; go on from a checkpoint (ckpt_path=...)."
            )
        windows = loop.windows_completed()
        progress.batch_idx += by
        progress.total_before -= by
        progress.stepped_before += windows - loop.windows_completed()

    def move_all_batches(self, by: int) -> None:
        self.progress.total_before += by
        self.progress.boundary = NOW

    def steps(self, name: str) -> int:
        """Of the optimizer, in automatic optimization."""
        if not self.automatic:
            return 0
        open_step = name == "ready" and FORWARD <= self.place < STEPPED and not self.loop._window_is_open()
        return self.progress.global_step + open_step

    def steps_in_epoch(self, name: str) -> int:
        return max(0, self.steps(name) - self.progress.stepped_before)

    def manual_steps(self, name: str) -> int:
        """Of all optimizers, in manual optimization."""
        if self.automatic:
            return 0
        table = self.loop.trainer._metric_log.current
        begins = name == "ready" and table is not None and table.hook == "on_before_optimizer_step"
        return self.progress.global_step + begins

    def move_steps(self, by: int) -> None:
        self.progress.global_step += by
        self.progress.boundary = NOW

    def zeroings(self, name: str) -> int:
        """Times that the gradients were released: once for each window that has begun."""
        if not self.automatic or self.loop.plans is None:
            return 0
        progress, window = self.progress, self.window
        begun = progress.stepped_before + math.ceil((progress.batch_idx + 1) / window)
        last = {"ready": FORWARD, "started": BEFORE_ZERO}.get(name, ZERO)
        return max(0, begun - (progress.batch_idx % window == 0 and self.place <= last))

    def zeroings_in_epoch(self, name: str) -> int:
        return max(0, self.zeroings(name) - self.progress.stepped_before)

    def schedulings(self, name: str) -> int:
        """Steps of learning rate schedulers."""
        table = self.loop.trainer._metric_log.current
        begins = name == "ready" and table is not None and table.hook == "lr_scheduler_step"
        return self.progress.scheduled + begins

    def schedulings_in_epoch(self, name: str) -> int:
        return self.schedulings(name) - self.progress.scheduled_before

    def move_schedulings(self, by: int) -> None:
        self.progress.scheduled += by

    def move_schedulings_in_epoch(self, by: int) -> None:
        self.progress.scheduled_before -= by

    def is_last_batch(self) -> bool:
        return self.loop.trainer.is_last_batch

    # -- the same, as views

    def epoch_progress(self) -> ProgressView:
        return ProgressView(Tracker(self.epochs, self.move_epoch))

    def batch_progress(self) -> BatchProgressView:
        total, current = Tracker(self.all_batches, self.move_all_batches), Tracker(self.batches, self.move_batches)
        return BatchProgressView(total, current, self.is_last_batch)

    def scheduler_progress(self) -> ProgressView:
        current = Tracker(self.schedulings_in_epoch, self.move_schedulings_in_epoch)
        return ProgressView(Tracker(self.schedulings, self.move_schedulings), current, DONE)

    def automatic_optimization(self) -> Namespace:
        optimizer = Namespace(
            step=ProgressView(Tracker(self.steps, self.move_steps), Tracker(self.steps_in_epoch), DONE),
            zero_grad=ProgressView(Tracker(self.zeroings), Tracker(self.zeroings_in_epoch), BEGUN),
        )
        return Namespace(optim_progress=OptimizationView(optimizer))

    def manual_optimization(self) -> Namespace:
        steps = Tracker(self.manual_steps, self.move_steps)
        return Namespace(optim_step_progress=ProgressView(steps, steps, DONE))


class StageCounters:
    """The same of a loop that evaluates or predicts: batches over all of its loaders, in this run and in all of them.

    `total` of the validation inside a fit begins anew with each epoch.
    """

    def __init__(self, loop: StageLoop) -> None:
        self.loop = loop
        self.total_before = 0  # batches of runs before this one
        self.running = False
        hooks = loop.names.hooks
        self.places = {
            **dict.fromkeys(
                ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"), RECEIVE
            ),
            f"on_{hooks}_batch_start": BATCH_START,
            f"{hooks}_step": FORWARD,
            f"on_{hooks}_batch_end": BATCH_END,
        }

    def begin_run(self) -> None:
        self.total_before += self.loop.batches_run
        self.loop.batches_before, self.loop.batch_idx = 0, -1
        self.running = True

    def in_run(self, name: str) -> int:
        table = self.loop.trainer._metric_log.current
        place = self.places.get(table.hook) if self.running and table is not None else None
        return max(0, self.loop.batches_run - (place is not None and place <= _NOT_YET[name]))

    def in_all(self, name: str) -> int:
        return self.total_before + self.in_run(name)

    def move_run(self, by: int) -> None:
        """The total stays."""
        if self.running:
            raise AttributeError("batch_progress.current of a loop cannot be set while it runs.")
        self.loop.batches_before += by
        self.total_before -= by

    def move_all(self, by: int) -> None:
        self.total_before += by

    def is_last_batch(self) -> bool:
        loop, done = self.loop, self.loop.batches_run
        combined = loop.combined
        sequential = combined is None or combined.mode == "sequential"
        return done > 0 and done == (sum(loop.max_batches) if combined is None or sequential else combined.length)

    def batch_progress(self) -> BatchProgressView:
        return BatchProgressView(
            Tracker(self.in_all, self.move_all), Tracker(self.in_run, self.move_run), self.is_last_batch
        )


class Restarted:
    """Whether a fit goes on from a checkpoint, and from where in an epoch; all False once its first epoch is over."""

    progress: Progress
    max_steps: int

    @property
    def is_resuming(self) -> bool:
        return self.progress.resumed is not None

    @property
    def _resumed_at(self) -> str:
        """Where in an epoch the checkpoint was written, as `Progress.resumed` has it; "" in a run without one."""
        return "" if self.progress.resumed is None else self.progress.resumed[0]

    @property
    def restarting(self) -> bool:
        """Inside an epoch; where steps are limited, at its end too."""
        begun = self.restarted_on_epoch_start or self.restarted_mid_epoch
        return self.is_resuming and (begun or self.max_steps != -1)

    @property
    def restarted_on_epoch_start(self) -> bool:
        return self._resumed_at == "epoch_start"

    @property
    def restarted_mid_epoch(self) -> bool:
        return self._resumed_at in ("batch_end", "batches")

    @property
    def restarted_on_epoch_end(self) -> bool:
        return self._resumed_at == "epoch_end" and self.max_steps != -1

    @property
    def resumed_on_epoch_end(self) -> bool:
        return self._resumed_at == "epoch_end" and self.max_steps == -1


class OptimizationView:
    """`optim_progress`: the optimizer's steps and zeroings."""

    def __init__(self, optimizer: Namespace) -> None:
        self.optimizer = optimizer

    @property
    def optimizer_steps(self) -> int:
        return int(self.optimizer.step.total.completed)

    def reset(self) -> None:
        """Count the steps anew; how often gradients were released follows from them."""
        self.optimizer.step.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": {name: view.state_dict() for name, view in vars(self.optimizer).items()}}


class EpochLoop:
    """`fit_loop.epoch_loop`: the running epoch, and its counters under Lightning's names."""

    val_loop: EvaluationLoop  # validates inside a fit; the Trainer puts it here

    def __init__(self, fit_loop: FitLoop) -> None:
        self._fit_loop, self.counters = fit_loop, Counters(fit_loop)
        self.batch_progress = self.counters.batch_progress()
        self.scheduler_progress = self.counters.scheduler_progress()
        self.automatic_optimization = self.counters.automatic_optimization()
        self.manual_optimization = self.counters.manual_optimization()

    @property
    def batch_idx(self) -> int:
        return self.counters.batches("ready") - 1

    @property
    def total_batch_idx(self) -> int:
        return self.counters.all_batches("ready") - 1

    @property
    def global_step(self) -> int:
        return self._fit_loop.progress.global_step

    @property
    def max_steps(self) -> int:
        return self._fit_loop.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self._fit_loop.max_steps = steps

    @property
    def min_steps(self) -> int | None:
        return self._fit_loop.min_steps

    @min_steps.setter
    def min_steps(self, steps: int | None) -> None:
        self._fit_loop.min_steps = steps

    @property
    def is_resuming(self) -> bool:
        """Whether the first batch after a checkpoint is not through yet."""
        progress = self._fit_loop.progress
        if progress.resumed is None or progress.stage == "epoch_end":
            return False
        return progress.batch_idx <= progress.resumed[1] + 1

    @property
    def restarting(self) -> bool:
        return self.is_resuming and self._fit_loop.restarting

    @property
    def restarted_on_train_batch_end(self) -> bool:
        return self.restarting and self._fit_loop._resumed_at == "batch_end"

    @property
    def restarted_on_last(self) -> bool:
        return self.restarting and self._fit_loop._resumed_at != "batch_end"

    @property
    def _is_training_done(self) -> bool:
        return self._fit_loop._steps_reached() or self._num_ready_batches_reached()

    @property
    def done(self) -> bool:
        """Whether the running batch is the last one before the epoch's end, or a stop that may come."""
        loop = self._fit_loop
        return self._is_training_done or (loop.trainer.should_stop and loop._may_stop())

    @property
    def _batches_that_stepped(self) -> int:
        """Windows completed before the batch that runs: it does not count itself before its validation is over."""
        progress = self._fit_loop.progress
        counts = progress.stage not in ("batch", "broken", "stepped", "validated")
        return self._fit_loop.windows_completed(progress.batch_idx + counts)

    @_batches_that_stepped.setter
    def _batches_that_stepped(self, windows: int) -> None:
        self._fit_loop.progress.stepped_before += windows - self._batches_that_stepped

    def _accumulated_batches_reached(self) -> bool:
        return self.counters.batches("ready") % self.counters.window == 0

    def _num_ready_batches_reached(self) -> bool:
        return self._fit_loop.trainer.is_last_batch

    def _should_accumulate(self) -> bool:
        """Whether the running batch only gathers gradients."""
        return not self._accumulated_batches_reached() and not self._num_ready_batches_reached()

    def state_of_loops(self) -> dict[str, Any]:
        """The counters of every loop under the keys that Lightning's checkpoints have; loops outside a fit are idle."""
        automatic, manual = self.automatic_optimization.optim_progress, self.manual_optimization.optim_step_progress
        epochs = self._fit_loop.epoch_progress.state_dict()
        for counts in epochs.values():
            counts["ready"] = counts["started"]  # else Lightning, going on from there, would leave that epoch out
        fit = {
            "state_dict": {},
            "epoch_loop.state_dict": {"_batches_that_stepped": self._batches_that_stepped},
            "epoch_loop.batch_progress": self.batch_progress.state_dict(),
            "epoch_loop.scheduler_progress": self.scheduler_progress.state_dict(),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": automatic.state_dict(),
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": manual.state_dict(),
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": self.val_loop.batch_progress.state_dict(),
            "epoch_progress": epochs,
        }
        batches = {when: dict.fromkeys(ALL, 0) for when in ("total", "current")}
        idle = {"state_dict": {}, "batch_progress": {**batches, "is_last_batch": False}}
        predict = {"state_dict": {}, "batch_progress": batches}
        return {"fit_loop": fit, "validate_loop": idle, "test_loop": idle, "predict_loop": predict}
