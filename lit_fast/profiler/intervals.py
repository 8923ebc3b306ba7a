"""Sets of times, as lists of intervals that neither touch nor overlap, in order. Times are whole numbers, so sums are
exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Intervals = list[tuple[int, int]]  # (begin, end)


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """
    >>> union([(5, 7), (0, 2), (1, 3), (7, 8), (9, 9)])
    [(0, 3), (5, 8)]
    """
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def shared(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> Intervals:
    """What lies in both of two such sets.

    >>> shared([(0, 10), (20, 30)], [(5, 22), (25, 26)])
    [(5, 10), (20, 22), (25, 26)]
    """
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in intervals)
