"""How much a bucket should hold: from when gradients arrive, and how long the link takes for so many bytes.

Many small buckets start early and pay the link's latency each time; few large ones pay it rarely and start late. The
link sends one at a time, in order, so that a bucket has been sent at

    max(when the one before has been sent, arrival of its last gradient) + seconds(bytes)

and wanted is the earliest such time of the last one. This is the batching of jobs that are released over time, on one
machine with a setup time: dynamic programming over where buckets end is exact, because what has been sent earlier never
makes a later bucket late.

Sources: Shi, Chu, Li 2019, "MG-WFBP: Efficient Data Communication for Distributed Synchronous SGD Algorithms"; on such
machines: Potts, Kovalyov 2000, "Scheduling with batching: a review".
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

SMALLEST_PROBES = (64, 512)  # bytes


class Link(NamedTuple):
    """What a collective costs: a line between each two measured sizes, beyond them the lines of the outermost two.

    `sizes` in bytes of the tensor that is reduced, rising, two or more; `times` in s, none below the one before.
    """

    sizes: tuple[float, ...]
    times: tuple[float, ...]

    def seconds(self, nbytes: float) -> float:
        """Of a collective of so many bytes, never below 0."""
        right = min(max(bisect.bisect_left(self.sizes, nbytes), 1), len(self.sizes) - 1)
        size, time = self.sizes[right - 1], self.times[right - 1]
        slope = (self.times[right] - time) / (self.sizes[right] - size)
        return max(0.0, time + (nbytes - size) * slope)

    @property
    def latency(self) -> float:
        """s of a collective of next to nothing."""
        return self.seconds(0)

    @property
    def bandwidth(self) -> float:
        """bytes/s between the two largest sizes."""
        seconds = self.times[-1] - self.times[-2]
        return (self.sizes[-1] - self.sizes[-2]) / seconds if seconds else float("inf")


def probe_sizes(total: int) -> list[int]:
    """The sizes in bytes at which a link should be measured that is to carry buckets of up to `total` bytes.

    Example:
        >>> probe_sizes(1 << 26)
        [16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864]
    """
    total = max(total, SMALLEST_PROBES[-1])
    return sorted({max(total // 4**power, SMALLEST_PROBES[0]) for power in range(7)})


def fit_link(samples: Iterable[tuple[float, float]]) -> Link:
    """The link that measured collectives tell of.

    Args:
        samples: (bytes, seconds) of collectives; of those of one size the fastest counts: what disturbs one only adds.

    Raises:
        ValueError: all are of one size.

    Example:
        >>> link = fit_link([(1e6, 0.003), (2e6, 0.005), (2e6, 0.005), (2e6, 0.9)])
        >>> round(link.latency, 6), round(link.bandwidth)
        (0.001, 500000000)
    """
    seconds_of: dict[float, list[float]] = {}
    for nbytes, seconds in samples:
        seconds_of.setdefault(nbytes, []).append(seconds)
    if len(seconds_of) < 2:
        raise ValueError(f"A link is measured with collectives of two sizes or more; given were {sorted(seconds_of)}.")
    sizes = sorted(seconds_of)
    # Noise may make a larger one look faster.
    times = accumulate((min(seconds_of[size]) for size in sizes), max)
    return Link(tuple(sizes), tuple(times))


def sent_times(
    arrivals: Sequence[float], sizes: Sequence[float], ends: Sequence[int], seconds: Callable[[float], float]
) -> list[float]:
    """When each bucket has been sent, in the clock of `arrivals`.

    Args:
        arrivals: s, when each gradient is there, in the order in which they come.
        sizes: bytes of each on the wire.
        ends: of each bucket, one after its last gradient; the last one is `len(sizes)`.
        seconds: of a collective of so many bytes.

    Example:
        >>> sent_times([1.0, 2.0, 3.0], [10, 10, 10], [2, 3], lambda nbytes: 0.5 + nbytes / 10)
        [4.5, 6.0]
    """
    free, begin, times = 0.0, 0, []
    for end in ends:
        free = max(free, arrivals[end - 1]) + seconds(sum(sizes[begin:end]))
        times.append(free)
        begin = end
    return times


def best_buckets(
    arrivals: Sequence[float],
    sizes: Sequence[float],
    seconds: Callable[[float], float],
    *,
    largest: float = float("inf"),
    reserve: float = 0.5,
) -> list[int]:
    """Where buckets should end for the last one to be sent as early as it can be, in few buckets.

    The same arguments give the same answer. That all processes take the same one is the caller's business.

    Args:
        arrivals: s, when each gradient is there, in the order in which they come (what is earlier than the one before
            it is taken to come with that one).
        sizes: bytes of each on the wire.
        seconds: of a collective of so many bytes, more for more; `Link.seconds`.
        largest: bytes that no bucket may exceed, but for a gradient that does alone.
        reserve: buckets are made longer while they are still sent in time; this share of the time to spare is kept,
            for a link or a backward that is not as it was measured. 0 makes the fewest buckets.

    Returns:
        the end of each bucket, one after its last gradient; the last is `len(sizes)`.

    Example:
        >>> best_buckets([1.0, 2.0, 3.0], [10, 10, 10], lambda nbytes: 0.1 + nbytes / 100)
        [2, 3]
    """
    arrived = list(accumulate(arrivals, max))
    before = [0.0, *accumulate(sizes)]  # bytes of the gradients before each

    def begins(end: int) -> Iterator[int]:
        """Where a bucket with this end may begin, the shortest first."""
        yield end - 1
        for begin in range(end - 2, -1, -1):
            if before[end] - before[begin] > largest:
                return
            yield begin

    earliest = [0.0]  # when all gradients before each can have been sent
    for end in range(1, len(sizes) + 1):
        best = float("inf")
        for begin in begins(end):
            free = max(earliest[begin], arrived[end - 1])
            best = min(best, free + seconds(before[end] - before[begin]))
            if free == arrived[end - 1]:
                break  # the link is free by then: a longer bucket only sends more
        earliest.append(best)

    # From the last one back, each bucket as long as it may be; `due` is when it must have been sent.
    ends: list[int] = []
    end, due = len(sizes), earliest[-1]
    while end:
        ends.append(end)
        for begin in begins(end):
            spent = seconds(before[end] - before[begin])
            if max(earliest[begin], arrived[end - 1]) + spent <= due:
                longest, left = begin, max(due - spent, earliest[begin])
        due = left - reserve * (left - earliest[longest])
        end = longest
    return ends[::-1]
