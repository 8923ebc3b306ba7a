"""Collectives on the timeline: those of the steps that are shown, and how fast they were."""

from __future__ import annotations

import pytest

from lit_fast.distributed.flights import Flight
from lit_fast.ops import SpanTime
from lit_fast.profiler.collectives import bus_bandwidth, spans_of
from lit_fast.profiler.record import Span


class Landed:
    def __init__(self, *flights: Flight) -> None:
        self.landed = lambda: list(flights)


def test_each_has_the_step_that_it_began_in() -> None:
    shown = [SpanTime("forward", None, 7, 100, 50), SpanTime("backward", None, 7, 150, 50)]
    shown += [SpanTime("loop", None, 7, 90, 200), SpanTime("forward", None, 8, 300, 50)]
    flights = [Flight("a", 8, begin, begin + 10) for begin in (80, 90, 299, 300, 900)]
    found = spans_of(Landed(*flights), shown)  # type: ignore[arg-type]
    assert [(round(span.begin * 1e9), span.step) for span in found] == [(90, 7), (299, 7), (300, 8), (900, 8)]
    assert {(span.track, span.name, span.bytes) for span in found} == {("collectives", "a", 8)}
    assert spans_of(Landed(*flights), []) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "world_size", "expected"),
    [
        ("all_reduce gradients 0", 2, 1e9),
        ("all_reduce gradients 0", 8, 1.75e9),
        ("reduce_scatter gradients 0", 2, 0.5e9),
        ("all_gather parameters 1", 4, 0.75e9),
        ("all_to_all gradients 1", 4, 0.75e9),
        ("waiting: barrier", 4, None),
        ("all_reduce gradients 0", 1, None),
    ],
)
def test_bus_bandwidth(name: str, world_size: int, expected: float | None) -> None:
    found = bus_bandwidth(Span("collectives", name, 0.0, 1e-3, bytes=1e6), world_size)
    assert found == (None if expected is None else pytest.approx(expected))
