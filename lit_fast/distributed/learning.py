"""What the first backwards tell about buckets: the order in which gradients arrive, and how much a bucket should hold.

The first backward tells the order. Where nobody says how much a bucket holds, the next ones are timed, the link is
measured, and from then on buckets end where the last one will have been sent first (`tuning.py`). That takes the
processor to be free while the link is busy. With Gloo it is the processor that moves the bytes, so there the buckets so
found are tried, and kept if backwards are faster for it. What the first process of the group has found holds for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.distributed.timing import Arrivals, measure_link, processor_moves_bytes
from lit_fast.distributed.tuning import best_buckets

MEBIBYTE = 1 << 20
TIMED = 3  # backwards after the first one, which finds nothing in caches and allocates; again as many of a trial

Members = list[list[int]]  # of each bucket: indices of parameters in the order of arrival, all of one dtype


class BucketSizes(NamedTuple):
    """How much a bucket holds, in bytes on the wire: the first one, which backward fills first, and every other."""

    first: int = MEBIBYTE
    rest: int = 25 * MEBIBYTE


DEFAULT_SIZES = BucketSizes()


class Learning:
    """Looks on while backwards run, and says how buckets should be laid out for the next one.

    Args:
        params: whose gradients are reduced.
        group: of torch.distributed.
        wires: the dtype in which each one's gradient travels.
        sizes: of the buckets; measured and chosen where None, and those of torch until then. Where torch's algorithms
            shall be deterministic (`torch.use_deterministic_algorithms`) nothing is measured: a sum of three numbers or
            more depends on where a ring cuts a bucket.
    """

    def __init__(
        self, params: Sequence[Parameter], group: Any, wires: Sequence[torch.dtype], sizes: BucketSizes | None
    ) -> None:
        self.params, self.group, self.wires = params, group, wires
        self.sizes = sizes or DEFAULT_SIZES
        self._last = 1 if sizes is not None or torch.are_deterministic_algorithms_enabled() else 1 + TIMED
        self._begun = 0.0
        self._took: list[float] = []  # s, of each backward with its exchange
        self._trial = False
        self._order = list(reversed(range(len(params))))  # of registration: a guess
        self._arrivals = Arrivals(params)
        self.remove_hooks = self._arrivals.remove_hooks

    @property
    def over(self) -> bool:
        """Whether there is nothing more to learn."""
        return len(self._took) >= self._last

    def start(self) -> None:
        """Before a backward."""
        self._arrivals.start()
        self._begun = time.perf_counter()

    def stop(self) -> Members | None:
        """After a backward that followed `start`, and its exchange: a new layout, if it told one. All processes call
        it.
        """
        self._took.append(time.perf_counter() - self._begun)
        self._arrivals.stop()
        if len(self._took) == 1:
            arrived = self._arrivals.order()
            seen = set(arrived)
            self._order = self._as_the_first([*arrived, *(index for index in self._order if index not in seen)])
            return self.filled()
        if not self.over:
            return None
        if self._trial:
            return None if self._was_faster() else self.filled()
        chosen = self._chosen()
        self.remove_hooks()
        if processor_moves_bytes(self.group, self.params[0].device) and chosen != self.filled():
            self._trial = True
            self._last += TIMED
        return chosen

    def _was_faster(self) -> bool:
        """The trial, than what was before it."""
        before, trial = (statistics.median(self._took[first : first + TIMED]) for first in (1, 1 + TIMED))
        return bool(self._as_the_first([trial < before])[0])

    def filled(self) -> Members:
        """Buckets that are filled up to `sizes`."""
        return self._cut(self._full_at)

    def _full_at(self, members: list[int]) -> Iterator[int]:
        itemsize = self.wires[members[0]].itemsize
        layouts = ops.lay_out_buckets(
            [self.params[index].numel() for index in members],
            first_capacity=max(1, self.sizes.first // itemsize),
            capacity=max(1, self.sizes.rest // itemsize),
        )
        return (layout.slots[-1][0] + 1 for layout in layouts)

    def _chosen(self) -> Members:
        """Buckets that end where the last one has been sent first."""
        arrivals = self._arrivals.seconds()
        nbytes = [p.numel() * wire.itemsize for p, wire in zip(self.params, self.wires, strict=True)]
        link = measure_link(self.group, self.wires[0], self.params[0].device, sum(nbytes))

        def ends(members: list[int]) -> list[int]:
            return best_buckets(
                [arrivals.get(index, 0.0) for index in members], [nbytes[index] for index in members], link.seconds
            )

        closing = [0] * len(self.params)
        for members in self._cut(ends):
            closing[members[-1]] = 1
        agreed = self._as_the_first(closing)
        return self._cut(lambda members: (end for end, index in enumerate(members, 1) if agreed[index]))

    def _cut(self, ends: Callable[[list[int]], Iterator[int] | list[int]]) -> Members:
        """Buckets of each dtype that end where `ends` says of its members, in the order in which they will be full."""
        kinds: dict[torch.dtype, list[int]] = {}
        for index in self._order:
            kinds.setdefault(dtype_of_gradient(self.params[index]), []).append(index)
        buckets: Members = []
        for members in kinds.values():
            begin = 0
            for end in ends(members):
                buckets.append(members[begin:end])
                begin = end
        place = {index: number for number, index in enumerate(self._order)}
        return sorted(buckets, key=lambda members: place[members[-1]])

    def _as_the_first(self, numbers: list[int]) -> list[int]:
        """The first process's."""
        shared = torch.tensor(numbers, dtype=torch.int64, device=self.params[0].device)
        dist.broadcast(shared, dist.get_global_rank(self.group, 0) if self.group is not None else 0, group=self.group)
        return shared.tolist()


def dtype_of_gradient(param: Tensor) -> torch.dtype:
    """In which autograd leaves its gradient."""
    return getattr(param, "grad_dtype", None) or param.dtype
