"""The small callables that a plan is made of, each bound once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lit_fast.errors import MisconfigurationException

if TYPE_CHECKING:
    from lit_fast.binding import StepPlan
    from lit_fast.metrics import MetricLog, Table
    from lit_fast.module import LightningModule
    from lit_fast.progress import Progress
    from lit_fast.trainer import Trainer

Bound = tuple[Callable[..., Any], ...]


def run_all(functions: Bound) -> None:
    for function in functions:
        function()


def no_closure() -> None: ...


def callback_hook(
    hook: Callable[..., Any], log: MetricLog, table: Table, trainer: Trainer, module: LightningModule, fixed: Any
) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        log.current = table
        return hook(trainer, module, *args, *fixed)

    return call


def module_hook(hook: Callable[..., Any], log: MetricLog, table: Table, fixed: Any = ()) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        log.current = table
        return hook(*args, *fixed)

    return call


def skip(plan: StepPlan, batch: None, batch_idx: int) -> None:
    """A batch that is None, which a loader may give for samples that it could not read: only what follows a step."""
    for receive in plan.receive:
        batch = receive(batch)
    plan.log.batch = None
    warnings.warn(
        "The training data gave a batch that is None: no step is taken for it. Where it is meant so, ignore this.",
        stacklevel=2,
    )
    for schedule in plan.schedulers:
        schedule(batch_idx)
    for hook in plan.on_train_batch_end:
        hook(None, None, batch_idx)


class Called:
    """A closure that knows whether it ran: an `optimizer_step` that never runs it would train nothing."""

    __slots__ = ("closure", "ran")

    def __init__(self, closure: Callable[[], Any]) -> None:
        self.closure, self.ran = closure, False

    def __call__(self) -> Any:
        self.ran = True
        return self.closure()

    def check(self, module: LightningModule) -> None:
        if not self.ran:
            raise MisconfigurationException(
                f"{type(module).__name__}.optimizer_step did not run its closure, which runs training_step and "
                f"backward; call optimizer.step(closure=optimizer_closure), or optimizer_closure() where the step is "
                f"to be left out."
            )


def without_index(hook: Callable[..., Any]) -> Callable[[int], Any]:
    return lambda batch_idx: hook()


def every(frequency: int, advance: Callable[[], None]) -> Callable[[int], None]:
    def schedule(batch_idx: int) -> None:
        if (batch_idx + 1) % frequency == 0:
            advance()

    return schedule


def at_epoch_end(frequency: int, advance: Callable[[], None], progress: Progress) -> Callable[[int], None]:
    def schedule(batch_idx: int) -> None:
        last = progress.is_last_batch or batch_idx + 1 == progress.total
        if last and (progress.epoch + 1) % frequency == 0:
            advance()

    return schedule


def positional_arguments(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function)).split(".<locals>.")[-1]
