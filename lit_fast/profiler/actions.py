"""Named actions around what a run calls: put there when something is bound, so that without a profiler nothing is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from lit_fast.profiler.profiler import Profiler


def recorded(profiler: Profiler | None, action: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` inside `profiler.profile(action)`; `function` itself where there is no profiler."""
    if profiler is None:
        return function

    @wraps(function)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return function(*args, **kwargs)

    return profiled


def recorded_batches(
    profiler: Profiler | None, action: str, batches: Iterator[Any], length: float | None
) -> Iterator[Any]:
    """The same batches, each fetched inside `profiler.profile(action)`, but for the call after the last of `length`."""
    return batches if profiler is None else _recorded_batches(profiler, action, iter(batches), length)


def _recorded_batches(profiler: Profiler, action: str, batches: Iterator[Any], length: float | None) -> Iterator[Any]:
    end, fetched = object(), 0
    while length is None or fetched < length:
        with profiler.profile(action):
            batch = next(batches, end)
        if batch is end:
            return
        fetched += 1
        yield batch
    yield from batches
