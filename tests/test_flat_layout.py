"""Where gradients lie in buckets: every element has one place, and what is needed beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_fast import ops
from lit_fast.errors import KernelError

CHUNK = ops.square_chunk()
SIZES = st.one_of(
    st.integers(0, 70), st.integers(0, 3 * CHUNK), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK])
)


@settings(deadline=None)
@given(
    numels=st.lists(SIZES, max_size=12),
    first_capacity=st.integers(1, 2 * CHUNK),
    capacity=st.integers(1, 6 * CHUNK),
    segments=st.integers(1, 5),
    flags=st.integers(0, 2),
    last_flags=st.integers(0, 20),
)
@example([5 * CHUNK, 3, 5 * CHUNK + 1, 7, 2 * CHUNK], 10, 13 * CHUNK, 4, 1, 3)
@example([0, 0], 1, 1, 3, 0, 0)
def test_every_element_has_one_place(numels, first_capacity, capacity, segments, flags, last_flags):
    buckets = ops.lay_out_buckets(
        numels,
        first_capacity=first_capacity,
        capacity=capacity,
        segments=segments,
        flags=flags,
        last_flags=last_flags,
    )
    assert [index for bucket in buckets for index, _ in bucket.slots] == list(range(len(numels)))
    for number, bucket in enumerate(buckets):
        room = first_capacity if number == 0 else capacity
        sizes = [numels[index] for index, _ in bucket.slots]
        check_dense(bucket, sizes, segments)
        check_wire(bucket, sizes, last_flags if bucket is buckets[-1] else 0)
        assert len(sizes) == 1 or ends(sizes)[-1] <= room or sum(sizes[:-1]) == 0
        if bucket is not buckets[-1]:  # it was full
            assert ends([*sizes, numels[buckets[number + 1].slots[0][0]]])[-1] > room


def ends(sizes: list[int]) -> list[int]:
    """Of each, one behind the other from multiples of 16 on."""
    end, all_ends = 0, []
    for size in sizes:
        end = -(-end // 16) * 16 + size
        all_ends.append(end)
    return all_ends


def check_dense(bucket: ops.BucketLayout, sizes: list[int], segments: int) -> None:
    end = cuts = 0
    for (_, offset), size in zip(bucket.slots, sizes, strict=True):
        assert offset % 16 == 0 and offset >= end
        over = [cut for cut in range(bucket.segment, bucket.dense_size, bucket.segment) if offset < cut < offset + size]
        assert all((cut - offset) % CHUNK == 0 for cut in over)
        assert offset - end < (CHUNK if over or offset % bucket.segment == 0 else 16)
        cuts += len(over)
        end = offset + size
    assert end <= bucket.dense_size
    assert bucket.dense_size <= sum(sizes) + 16 * len(sizes) + (2 * segments - 1) * CHUNK
    if segments > 1:
        assert bucket.segment % CHUNK == 0 and cuts < segments
    else:
        assert bucket.dense_size == max(-(-ends(sizes)[-1] // 16), 1) * 16


def check_wire(bucket: ops.BucketLayout, sizes: list[int], last_flags: int) -> None:
    assert bucket.stride % 16 == 0
    assert 0 <= bucket.stride - bucket.last_flag_offset - last_flags < 16
    runs = [(wire, count) for _, _, wire, count in bucket.pieces]
    runs += [(place, 1) for places in bucket.used_flags for place in places]
    last = [rank * bucket.stride + bucket.last_flag_offset for rank in range(bucket.segments)]
    runs += [(place, last_flags) for place in last]
    runs.sort()
    assert all(count > 0 or last_flags == 0 for _, count in runs)
    assert all(begin + count <= after for (begin, count), (after, _) in pairwise(runs))
    assert not runs or runs[-1][0] + runs[-1][1] <= bucket.size
    assert [wire for _, _, wire, _ in bucket.pieces] == sorted(wire for _, _, wire, _ in bucket.pieces)
    for slot, ((_, offset), size) in enumerate(zip(bucket.slots, sizes, strict=True)):
        begin = 0
        for _, param_begin, wire, count in (piece for piece in bucket.pieces if piece[0] == slot):
            assert param_begin == begin
            rank, within = divmod(wire, bucket.stride)
            assert offset + begin == rank * bucket.segment + within and within + count <= bucket.segment
            begin += count
        assert begin == size
        assert len(bucket.used_flags[slot]) == bucket.segments * bucket.flags


@pytest.mark.parametrize(
    "wrong", [{"capacity": 0}, {"first_capacity": 0}, {"segments": 0}, {"flags": -1}, {"last_flags": -1}]
)
def test_numbers_that_no_bucket_has_are_refused(wrong):
    with pytest.raises(KernelError):
        ops.lay_out_buckets([3], **({"first_capacity": 8, "capacity": 8} | wrong))
    with pytest.raises(KernelError, match="not negative"):
        ops.lay_out_buckets([-3], first_capacity=8, capacity=8)
