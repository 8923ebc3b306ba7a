"""How one bucket travels: summed as it is, or in 16 bits and summed in float32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fast import ops
from lit_fast.distributed.flights import Flights


class Wire(Protocol):
    """The collectives of one bucket. `start` and `go_on` are called for all buckets in the same order everywhere."""

    segments: int  # equal parts of the bucket's layout on the wire

    def start(self, wire: Tensor) -> None:
        """Send what is packed in `wire`."""

    def go_on(self, wait: bool) -> bool:
        """Do what is possible, with `wait` all; whether nothing is left to be started."""

    def finish(self, wire: Tensor) -> None:
        """Wait until `wire` holds the sums of all processes."""

    def watch(self, flights: Flights, nbytes: int, number: int) -> None:
        """Tell a profiler of this bucket, which is that number, from here on."""


class AllReduce:
    """Sums are taken in the dtype that travels, by torch's own all-reduce."""

    segments = 1

    def __init__(self, group: Any) -> None:
        self._group = group
        self._work: Any = None

    def start(self, wire: Tensor) -> None:
        self._work = dist.all_reduce(wire, group=self._group, async_op=True)

    def go_on(self, wait: bool) -> bool:
        return True

    def finish(self, wire: Tensor) -> None:
        self._work.wait()
        self._work = None

    def watch(self, flights: Flights, nbytes: int, number: int) -> None:
        flights.watch(self, "start", "_work", "all_reduce", "gradients", nbytes, number)


class SumInFloat32:
    """16 bits travel, as many bytes as in a ring's all-reduce; every element is rounded when it is packed and once more
    when its sum is sent back, however many processes there are.

    Each process gets its segment from all the others, sums them in float32 by rank, and sends the sum to all. The two
    halves use groups of their own: a process may have come to the second half of one bucket when another has not yet
    begun the next one, and each group sees its collectives in the order of the buckets everywhere. On a GPU the second
    half waits for the first on a stream of its own, so both can be queued at once.

    Args:
        group, second: two groups of the same processes.
    """

    def __init__(self, group: Any, second: Any, wire: Tensor, segments: int) -> None:
        self._group, self._second, self.segments = group, second, segments
        stride = wire.numel() // segments
        self._received = torch.empty_like(wire)
        self._pieces = self._received.view(segments, stride)
        rank = dist.get_rank(group)
        self._own = wire[rank * stride : (rank + 1) * stride]
        self._stream = torch.cuda.Stream(wire.device) if wire.is_cuda else None  # type: ignore[no-untyped-call]
        self._bytes = wire.view(torch.uint8)  # gloo moves bytes of every dtype
        self._first_half: Any = None
        self._second_half: Any = None

    def start(self, wire: Tensor) -> None:
        self._second_half = None
        self._first_half = dist.all_to_all_single(
            self._received.view(torch.uint8), self._bytes, group=self._group, async_op=True
        )
        if self._stream is not None:
            self.go_on(wait=True)

    def go_on(self, wait: bool) -> bool:
        if self._second_half is not None:
            return True
        if not wait and not self._first_half.is_completed():
            return False
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._first_half.wait()
            ops.sum_pieces(self._pieces, self._own)
            self._second_half = dist.all_gather_into_tensor(
                self._bytes, self._own.view(torch.uint8), group=self._second, async_op=True
            )
        return True

    def finish(self, wire: Tensor) -> None:
        self.go_on(wait=True)
        self._second_half.wait()

    def watch(self, flights: Flights, nbytes: int, number: int) -> None:
        flights.watch(self, "start", "_first_half", "all_to_all", "gradients", nbytes, number)
        flights.watch(self, "go_on", "_second_half", "all_gather", "gradients", nbytes, number)
