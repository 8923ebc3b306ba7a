"""Which plan each micro-batch of a run has: the first or last of its window, by the window's length.

What stands in a plan is decided in binding.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

from lit_fast import step
from lit_fast.binding import Binding, StepPlan
from lit_fast.hooks import HOOKS
from lit_fast.module import LightningModule
from lit_fast.window import Place

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class Plans:
    """The plans of one fit. `windows(start, total)` gives the plan of each coming micro-batch."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.progress = trainer._progress
        self._bind(None)

    def _bind(self, before: Binding | None) -> None:
        self._bound_for = self._what_was_asked()
        self.binding = Binding(self.trainer, self.module, before)
        self.window, self.automatic, self.trains = self.binding.window, self.binding.automatic, self.binding.trains
        self.trainer.strategy._lightning_optimizers = self.binding.lightning_optimizers

    def refresh(self) -> None:
        """Bind again where callbacks or the module have changed since what the plans were bound for.

        That is: options of accumulation and clipping, optimizers, schedulers, callbacks, the precision, steps and
        hooks put on the module itself. The loop asks where nothing is under way: before training and each epoch.
        """
        self.trainer.strategy.refresh()
        asked = self._what_was_asked()
        if len(asked) != len(self._bound_for) or any(a is not b for a, b in zip(asked, self._bound_for, strict=True)):
            self._bind(self.binding)

    def _what_was_asked(self) -> list[Any]:
        """Everything that a binding depends on and a run may change, to be compared by identity."""
        trainer, own = self.trainer, self.module.__dict__
        asked = [
            trainer.accumulate_grad_batches,
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
            trainer.precision_plugin,
            self.module.automatic_optimization,
            trainer.fit_loop._skip_backward,
            *trainer.optimizers,
            *trainer.callbacks,
        ]
        for config in trainer.lr_scheduler_configs:
            asked += (config, config.scheduler, config.interval, config.frequency, config.reduce_on_plateau)
        asked += [own[name] for name in HOOKS if name in own]
        return asked

    @property
    def whole(self) -> StepPlan:
        """The plan of a micro-batch that is a window of its own, less its backward."""
        return self.binding.whole

    # -- the plans by place in a window

    def windows(self, start: int, total: int | None) -> Iterator[StepPlan]:
        """The plan of micro-batch `start` and of each one after it, in an epoch of `total` batches (None: unknown).

        A window is `accumulate_grad_batches` long; the last one of an epoch is shorter where the epoch does not
        divide, and its losses are then weighted by its real length.
        """
        if self.window == 1 or not self.automatic or not self.trains:
            return repeat(self.kind(True, True, 1))
        return self._windows(start, total)

    def _windows(self, start: int, total: int | None) -> Iterator[StepPlan]:
        batch_idx = start
        while True:
            begin = batch_idx - batch_idx % self.window
            length = self.window if total is None else min(self.window, total - begin)
            last = batch_idx + 1 == begin + length
            if total is None and self.progress.is_last_batch and not last:
                # A loader of unknown length ended inside a window, whose first gradients had the weight 1/window.
                yield self.kind(batch_idx == begin, True, self.window, short=True)
            else:
                yield self.kind(batch_idx == begin, last, length)
            batch_idx += 1

    def kind(self, first: bool, last: bool, length: int, short: bool = False) -> StepPlan:
        """The plan of a micro-batch that is the first and/or the last of a window of `length`."""
        return self.binding.place(Place(first, last, length, short))

    def explain(self) -> str:
        """Every point of the step with what is bound there and who asked for it, in execution order."""
        shape = "closure" if self.whole.run is step.closure else "inline"
        lines = [
            f"Training step of {type(self.module).__name__} on {self.trainer.config.device}, {shape} shape, "
            f"windows of {self.window} micro-batch{'es' if self.window > 1 else ''}:"
        ]
        costs = self.trainer._profiler.step_costs() if self.trainer._profiler is not None else {}
        order = [
            "receive", "on_train_batch_start", "training_step", "on_before_zero_grad", "zero_grad",
            "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "clip", "update",
            "schedulers", "on_train_batch_end",
        ]  # fmt: skip
        rows = list(dict.fromkeys(self.binding.rows))
        if self.automatic:
            if self.binding.overrides("backward"):
                rows.append(("backward", type(self.module).__name__, "its own backward"))
            elif not self.trainer.strategy.has_engine:
                rows.append(
                    ("backward", "lit_fast", "autograd engine, seeded with the micro-batch's share of its window")
                )
        for point in order:
            for row_point, who, what in rows:
                if row_point == point:
                    lines.append(f"  {point:<26} {who:<24} {what}")
        lines.extend(f"  {phase}: {microseconds:.1f} us a step" for phase, microseconds in costs.items())
        return "\n".join(lines)
