"""Bucket sizes from arrivals and a link, against every way of cutting; links from measured times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.distributed.tuning import Link, best_buckets, fit_link, probe_sizes, sent_times

AFFINE = Link((0.0, 100.0), (2.0, 12.0))  # 2 s and 10 bytes/s
BENT = Link((0.0, 20.0, 40.0), (1.0, 8.0, 9.0))  # as where a ring becomes cheaper than a tree


def every_partition(count: int) -> list[list[int]]:
    inner = range(1, count)
    return [[*cut, count] for length in range(count) for cut in itertools.combinations(inner, length)]


def best_of_all(
    arrivals: Sequence[float], sizes: Sequence[float], seconds: Callable[[float], float], largest: float = 1e9
) -> tuple[float, int]:
    """The earliest end of any partition, and in how few buckets it is reached, by trying them all."""

    def allowed(ends: list[int]) -> bool:
        buckets = zip([0, *ends], ends, strict=False)
        return all(end == begin + 1 or sum(sizes[begin:end]) <= largest for begin, end in buckets)

    tried = [ends for ends in every_partition(len(sizes)) if allowed(ends)]
    first = min(sent_times(arrivals, sizes, ends, seconds)[-1] for ends in tried)
    few = min(len(ends) for ends in tried if sent_times(arrivals, sizes, ends, seconds)[-1] == first)
    return first, few


# Eighths are exact in binary: equal ends of different partitions are equal numbers.
eighths = st.integers(0, 80).map(lambda number: number / 8)
gradients = st.lists(st.tuples(eighths, st.integers(1, 40)), min_size=1, max_size=8)


@given(gradients, st.integers(0, 24), st.sampled_from([0.125, 0.25, 1.0]))
@settings(max_examples=150, deadline=None)
def test_no_partition_ends_earlier(pairs: list[tuple[float, int]], latency: int, slope: float) -> None:
    arrivals, sizes = sorted(time for time, _ in pairs), [float(size) for _, size in pairs]
    seconds = lambda nbytes: latency / 8 + nbytes * slope  # noqa: E731
    first, few = best_of_all(arrivals, sizes, seconds)
    for reserve in (0.0, 0.5, 1.0):
        ends = best_buckets(arrivals, sizes, seconds, reserve=reserve)
        assert sent_times(arrivals, sizes, ends, seconds)[-1] == first
        assert ends[-1] == len(sizes) and ends == sorted(set(ends))
        assert len(ends) == few or reserve > 0


@given(gradients, st.integers(10, 60))
@settings(max_examples=100, deadline=None)
def test_bent_links_and_largest_buckets(pairs: list[tuple[float, int]], largest: int) -> None:
    arrivals, sizes = sorted(time for time, _ in pairs), [float(size) for _, size in pairs]
    first, _ = best_of_all(arrivals, sizes, BENT.seconds, largest)
    ends = best_buckets(arrivals, sizes, BENT.seconds, largest=largest)
    assert sent_times(arrivals, sizes, ends, BENT.seconds)[-1] == pytest.approx(first, rel=1e-12)
    assert all(e == b + 1 or sum(sizes[b:e]) <= largest for b, e in zip([0, *ends], ends, strict=False))


def test_what_decides() -> None:
    sizes = [10.0] * 6
    at_once, slowly = [0.0] * 6, [float(10 * index) for index in range(6)]
    assert best_buckets(at_once, sizes, AFFINE.seconds) == [6]  # nothing to wait for: one latency
    # The link is idle between gradients: the last one alone, and what came before in time for it, with half the time
    # that is to spare; with all of it in one bucket, with none in as many as there are.
    assert best_buckets(slowly, sizes, AFFINE.seconds, reserve=0.0) == [5, 6]
    assert best_buckets(slowly, sizes, AFFINE.seconds, reserve=1.0) == [1, 2, 3, 4, 5, 6]
    assert best_buckets(slowly, sizes, AFFINE.seconds, reserve=0.0, largest=20) == [1, 3, 5, 6]
    assert best_buckets([0.0, 5.0, 3.0], sizes[:3], AFFINE.seconds) == best_buckets(
        [0.0, 5.0, 5.0], sizes[:3], AFFINE.seconds
    )
    assert best_buckets([], [], AFFINE.seconds) == []


def test_sent_one_at_a_time() -> None:
    # Bytes 10, 10+10: the second waits for the link, not for its gradients.
    assert sent_times([1.0, 2.0, 3.0], [10, 10, 10], [1, 3], AFFINE.seconds) == [4.0, 8.0]
    assert sent_times([1.0, 2.0, 9.0], [10, 10, 10], [1, 3], AFFINE.seconds) == [4.0, 13.0]


@given(st.integers(0, 1000), st.integers(1, 1000))
@settings(max_examples=30, deadline=None)
def test_a_line_is_found_again(latency: int, rate: int) -> None:
    sizes = probe_sizes(50_000_000)
    link = fit_link([(size, latency * 1e-6 + size / (rate * 1e8)) for size in sizes])
    assert link.latency == pytest.approx(latency * 1e-6, abs=1e-12)
    assert link.bandwidth == pytest.approx(rate * 1e8)
    assert link.seconds(123_456_789) == pytest.approx(latency * 1e-6 + 1.23456789 / rate)


def test_noise_and_bends() -> None:
    bent = fit_link([(0.0, 1.0), (20.0, 8.0), (40.0, 9.0)])
    assert bent == BENT and [bent.seconds(nbytes) for nbytes in (10, 30, 60)] == [4.5, 8.5, 10.0]
    assert fit_link([(1, 2.5), (1, 9.0), (1, 3.0), (4, 2.0)]) == Link((1, 4), (2.5, 2.5))  # fastest; never faster
    assert fit_link([(1, 2.0), (4, 2.0)]).bandwidth == float("inf")
    assert fit_link([(10, 1.0), (20, 3.0)]).latency == 0.0
    with pytest.raises(ValueError, match=r"two sizes or more; given were \[8\]"):
        fit_link([(8, 1.0), (8, 2.0)])


def test_probes_span_what_buckets_may_hold() -> None:
    for total in (1, 100, 1000, 20_000_000):
        sizes = probe_sizes(total)
        assert len(sizes) >= 2 and sizes == sorted(set(sizes)) and sizes[0] >= 64
        assert sizes[-1] == max(total, 512)
