"""The training step, in execution order. Everything that could be decided was decided when the plan was bound.

A point where nothing is bound is an empty tuple: it costs one loop over nothing (15 ns). The two shapes differ in who
calls backward: `inline` does; `closure` hands `training_step` and backward to the user's `optimizer_step`, or to an
optimizer that evaluates the loss itself (LBFGS). Micro-batches that only accumulate always run inline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_fast.binding import StepPlan


def inline(plan: StepPlan, batch: Any, batch_idx: int) -> None:
    """One micro-batch: forward, backward and, in the last one of its window, the optimizer's step."""
    for receive in plan.receive:
        batch = receive(batch)
    plan.log.batch = batch
    for hook in plan.on_train_batch_start:
        hook(batch, batch_idx)

    plan.log.current = plan.table
    output = plan.training_step(batch, batch_idx)

    for release in plan.zero_grad:
        release(batch_idx)
    for loss in plan.losses(output):  # none where training_step returned None, or in manual optimization
        for hook in plan.on_before_backward:
            hook(loss)
        plan.backward(loss)
        for hook in plan.on_after_backward:
            hook()

    for hook in plan.on_before_optimizer_step:
        hook()
    for clip in plan.clip:
        clip()
    for update in plan.update:
        update()
    plan.progress.global_step += plan.steps

    for schedule in plan.schedulers:
        schedule(batch_idx)
    for hook in plan.on_train_batch_end:
        hook(output, batch, batch_idx)


def closure(plan: StepPlan, batch: Any, batch_idx: int) -> None:
    """One micro-batch whose forward and backward run when the optimizer calls for them, any number of times."""
    for receive in plan.receive:
        batch = receive(batch)
    plan.log.batch = batch
    for hook in plan.on_train_batch_start:
        hook(batch, batch_idx)

    output: Any = None

    def evaluate() -> Any:
        nonlocal output
        plan.log.current = plan.table
        output = plan.training_step(batch, batch_idx)
        for release in plan.zero_grad:
            release(batch_idx)
        for loss in plan.losses(output):
            for hook in plan.on_before_backward:
                hook(loss)
            plan.backward(loss)
            for hook in plan.on_after_backward:
                hook()
        return plan.returned_loss(output)

    plan.optimizer_step(batch_idx, evaluate)  # on_before_optimizer_step and clipping run in there, after `evaluate`
    plan.progress.global_step += plan.steps

    for schedule in plan.schedulers:
        schedule(batch_idx)
    for hook in plan.on_train_batch_end:
        hook(output, batch, batch_idx)
