"""The small callables that a plan is made of, each bound once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_fast.errors import MisconfigurationException

if TYPE_CHECKING:
    from lit_fast.binding import StepPlan
    from lit_fast.metrics import MetricLog, Table
    from lit_fast.module import LightningModule
    from lit_fast.progress import Progress

Bound = tuple[Callable[..., Any], ...]


def run_all(functions: Bound) -> None:
    for function in functions:
        function()


def no_closure() -> None: ...


def in_table(hook: Callable[..., Any], log: MetricLog, table: Table, arguments: int) -> Callable[..., Any]:
    """`hook` of that many positional arguments, for whose time `self.log` writes by the rules of `table`.

    Spelled out by number: a call through `*args` takes 0.27 us where one of these takes 0.10.
    """

    def none() -> Any:
        log.current = table
        return hook()

    def one(a: Any) -> Any:
        log.current = table
        return hook(a)

    def two(a: Any, b: Any) -> Any:
        log.current = table
        return hook(a, b)

    def three(a: Any, b: Any, c: Any) -> Any:
        log.current = table
        return hook(a, b, c)

    return (none, one, two, three)[arguments]


class NoBatch(Exception):
    """A hook on a batch's way to the device returned None."""


def not_none(batch: Any) -> Any:
    """Stands behind such hooks."""
    if batch is None:
        raise NoBatch
    return batch


def unless_none(run: Callable[..., None]) -> Callable[..., None]:
    """The step where such hooks are: what they turned into None takes none."""

    def run_received(plan: StepPlan, batch: Any, batch_idx: int) -> None:
        try:
            run(plan, batch, batch_idx)
        except NoBatch:
            _end_without_step(plan, batch_idx)

    return run_received


def skip(plan: StepPlan, batch: None, batch_idx: int) -> None:
    """A batch that is None, which a loader may give for samples that it could not read: only what follows a step."""
    try:
        for receive in plan.receive:
            batch = receive(batch)
    except NoBatch:
        pass
    else:
        if batch is not None:  # a hook made one
            return plan.run(replace(plan, receive=()), batch, batch_idx)
    _end_without_step(plan, batch_idx)


def _end_without_step(plan: StepPlan, batch_idx: int) -> None:
    plan.log.batch = None
    warnings.warn(
        "The training data gave a batch that is None, or a transfer hook made it so: no step is taken for it. Where it "
        "is meant so, ignore this.",
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


def without_index(hook: Callable[..., Any], log: MetricLog, table: Table) -> Callable[[int], Any]:
    """`in_table` for a hook without arguments, at a point of the step that gives the batch's index."""

    def call(batch_idx: int) -> Any:
        log.current = table
        return hook()

    return call


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
