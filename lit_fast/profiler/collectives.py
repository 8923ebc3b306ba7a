"""Collectives of the last steps, for a timeline, and how fast they were."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lit_fast.distributed.flights import Flights
from lit_fast.ops import SpanTime
from lit_fast.profiler.record import Span

TRACK = "collectives"
# What each link carries of a tensor of n processes, over (n - 1) / n of it: github.com/NVIDIA/nccl-tests,
# doc/PERFORMANCE.md.
_TIMES = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0, "all_to_all": 1.0}


def spans_of(flights: Flights, timed: Sequence[SpanTime]) -> list[Span]:
    """Those that began since the first of the calls that are shown, each with the step in which it did."""
    landed = flights.landed()
    if not timed or not landed:
        return []
    begins = sorted((span.begin, span.step) for span in timed)
    found = []
    for flight in landed:
        place = bisect_right(begins, (flight.begin, len(timed) + begins[-1][1])) - 1
        if place >= 0:
            seconds = (flight.end - flight.begin) * 1e-9
            found.append(Span(TRACK, flight.name, flight.begin * 1e-9, seconds, begins[place][1], flight.nbytes))
    return found


def bus_bandwidth(span: Span, world_size: int) -> float | None:
    """Bytes a second over each link, which compares with what the link can do whatever the number of processes.

    None where it is not known what the collective moves.

    Example:
        >>> bus_bandwidth(Span("collectives", "all_reduce gradients 0", 0.0, 1e-3, bytes=1e6), 4)
        1500000000.0
    """
    times = next((times for name, times in _TIMES.items() if span.name.startswith(name)), None)
    if times is None or span.bytes is None or span.seconds <= 0.0 or world_size < 2:
        return None
    return times * span.bytes * (world_size - 1) / world_size / span.seconds
