"""Gradients in flat buckets, each sent while backward still computes the next ones.

Backward writes every gradient into memory of its own. When the last gradient of a bucket has come, one kernel copies
all of them into the bucket, scaled and cast to the wire's dtype, and lets go of them; the bucket's all-reduce starts
there and then. When all have come back, each `p.grad` is a view of its bucket: nothing is copied out.

Which gradient of a bucket comes last is learned in the first backward, so that there is one hook for a bucket, not one
for a parameter: a hook that finds a gradient missing leaves its bucket to the end of the backward, where every bucket
that has not been sent is. A gradient can only be missing or new: those of earlier micro-batches are set aside before
the backward that reduces, and added while they are packed.

Behind its gradients a bucket carries a flag for each parameter (has it a gradient in this process?), and the last one
also what the processes agree on (`riders`): no collective is spent on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.distributed.flights import Flights
from lit_fast.distributed.learning import BucketSizes, Learning, Members, dtype_of_gradient
from lit_fast.distributed.wires import AllReduce, SumInFloat32, Wire
from lit_fast.errors import MisconfigurationException

RIDERS = 8  # numbers that the last bucket carries for `Riders`
EVERYTHING = 1 << 62  # elements


class Riders(Protocol):
    """What travels with the last bucket."""

    def board(self, seats: Tensor) -> None:
        """Write this process's numbers, all of `seats`; the sums over all processes come back."""

    def alight(self, seats: Tensor) -> None:
        """Take the sums."""


class Bucket:
    """Some parameters whose gradients travel together."""

    def __init__(
        self, layout: ops.BucketLayout, members: list[int], params: list[Parameter], names: list[str], wire: torch.dtype
    ) -> None:
        self.members = members  # indices of its parameters, in the order of arrival
        self.params = params
        self.layout = layout
        device = self.params[0].device
        self.wire = torch.zeros(layout.size, dtype=wire, device=device)
        grad_dtype = dtype_of_gradient(self.params[0])
        in_place = layout.segments == 1 and wire == grad_dtype
        self.flat = self.wire if in_place else torch.zeros(layout.dense_size, dtype=grad_dtype, device=device)
        offsets = [offset for _, offset in layout.slots]
        self.views = [
            torch.as_strided(self.flat, p.size(), p.stride(), offset)
            for p, offset in zip(self.params, offsets, strict=True)
        ]
        self.used = self.wire[layout.flag_offset : layout.last_flag_offset]
        self.riders = self.wire[layout.last_flag_offset : layout.last_flag_offset + RIDERS]
        self.packer = ops.Packer(self.params, layout.pieces, layout.used_flags, layout.size, names)
        self.missing: list[int] = []
        self.exchange: Wire

    def unpack(self) -> None:
        """Where gradients do not travel in their own dtype: from the wire to where they are kept."""
        if self.flat is self.wire:
            return
        for segment in range(self.layout.segments):
            there, here = segment * self.layout.stride, segment * self.layout.segment
            length = self.layout.segment
            ops.unpack(self.wire[there : there + length], self.flat[here : here + length])

    @property
    def last(self) -> Parameter:
        """The one whose gradient arrives last."""
        return self.params[-1]


class GradientBuckets:
    """The gradients of `params`, made their mean over all processes of `group` by every backward between `begin` and
    `finish`.

    Args:
        params: those that are trained, in the order of registration, the same in every process.
        group: of torch.distributed.
        sizes: of the buckets; measured and chosen where None (`learning.py`).
        wire_dtype: in which gradients travel; their own where None, summed in that. One of 16 bits is summed
            in float32 (`wires.py`).
        riders: what travels with them.
        names: of the parameters, for messages.

    Example::

        buckets = GradientBuckets(list(model.parameters()), dist.group.WORLD)
        buckets.begin()
        loss.backward()
        buckets.finish()  # p.grad is the mean over all processes
    """

    exchanges = True  # whether every process gets all sums

    def __init__(
        self,
        params: Sequence[Parameter],
        group: Any,
        *,
        sizes: BucketSizes | None = None,
        wire_dtype: torch.dtype | None = None,
        riders: Riders | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.params, self.group, self.riders = list(params), group, riders
        self.names = list(names or (f"parameter {index}" for index in range(len(self.params))))
        self.wires = [wire_dtype or dtype_of_gradient(p) for p in self.params]
        self.world_size = dist.get_world_size(group)
        self.scale = 1.0 / self.world_size
        self._second: Any = None  # a group for the second half of sums in float32
        if wire_dtype is not None and wire_dtype.itemsize == 2 and self.exchanges:
            self._second = dist.new_group(None if group is None else dist.get_process_group_ranks(group))
        self._hooks: list[Any] = []
        self._aside: list[Tensor | None] | None = None
        self._sent = 0  # buckets of the running backward whose collective has been started
        self.running = False
        self._flights: Flights | None = None  # of a profiler
        self._learning: Learning | None = Learning(self.params, group, self.wires, sizes)
        self._next: Members | None = None  # what the next backward's buckets shall hold, if something else
        self.lay_out(self._learning.filled())

    def lay_out(self, buckets: Members) -> None:
        """Have buckets of these members; the memory of those that were is let go of first."""
        self.buckets: list[Bucket] = []
        segments = 1 if self._second is None else self.world_size
        for members in buckets:
            params, names = [self.params[index] for index in members], [self.names[index] for index in members]
            [layout] = ops.lay_out_buckets(
                [p.numel() for p in params],
                first_capacity=EVERYTHING,
                capacity=EVERYTHING,
                segments=segments,
                flags=1,
                last_flags=RIDERS if members is buckets[-1] else 0,
            )
            bucket = Bucket(layout, members, params, names, self.wires[members[0]])
            bucket.exchange = (
                AllReduce(self.group)
                if self._second is None
                else SumInFloat32(self.group, self._second, bucket.wire, segments)
            )
            self.buckets.append(bucket)
        if self._flights is not None:
            self.watch(self._flights)

    def _lay_out_anew(self) -> None:
        """As has been learned, from here on with a hook for each bucket."""
        assert self._next is not None
        for hook in self._hooks:  # they hold buckets
            hook.remove()
        self.lay_out(self._next)
        self._next = None
        self._hooks = [_after_accumulation(bucket.last, self._full(n)) for n, bucket in enumerate(self.buckets)]

    def watch(self, flights: Flights) -> None:
        """Tell a profiler of every bucket, of those too that are laid out later."""
        first, self._flights = self._flights is None, flights
        if first and self._learning is not None:
            self._learning.stop = flights.timed(self._learning.stop, "bucket sizes")  # type: ignore[method-assign]
        for number, bucket in enumerate(self.buckets):
            bucket.exchange.watch(flights, bucket.wire.nbytes, number)

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._learning is not None:
            self._learning.remove_hooks()

    # -- one backward

    def begin(self) -> None:
        """Before a backward whose gradients are to be reduced, with those that are there already."""
        aside = [p.grad for p in self.params]
        if any(grad is not None for grad in aside):
            self._aside = aside
            for p in self.params:
                p.grad = None
        if self._next is not None:
            self._lay_out_anew()
        if self._learning is not None:
            self._learning.start()
        self._sent, self.running = 0, True

    def finish(self) -> None:
        """After it: send what has not been sent, wait for everything, and hand out the means."""
        for bucket in self.buckets[self._sent :]:
            self._send(bucket)
        self._sent, self.running = len(self.buckets), False
        again = [name for name, p in zip(self.names, self.params, strict=True) if p.grad is not None]
        if again:
            raise MisconfigurationException(
                f"{', '.join(again[:3])}{' and others' if len(again) > 3 else ''} got a second gradient in one "
                f"backward, after the first had been sent: activation checkpointing with use_reentrant=True runs "
                f"shared layers so. Set use_reentrant=False, or Trainer(strategy='ddp_torch')."
            )
        for number, bucket in enumerate(self.buckets):
            self._wait(number)
            self._hand_out(bucket)
        if self.riders is not None:
            self.riders.alight(self.buckets[-1].riders)
        self._aside = None
        if self._learning is not None:
            self._next = self._learning.stop()
            if self._learning.over:
                self._learning.remove_hooks()
                self._learning = None

    def _hand_out(self, bucket: Bucket) -> None:
        without: Sequence[int] = ()
        if bucket.missing:
            used = bucket.used.tolist()  # waits for a GPU, only where a gradient is missing here
            without = [place for place in bucket.missing if used[place] == 0.0]
        bucket.unpack()
        bucket.packer.assign(bucket.views, without)

    def _send(self, bucket: Bucket) -> None:
        aside = None if self._aside is None else [self._aside[index] for index in bucket.members]
        bucket.missing = bucket.packer.pack(bucket.wire, self.scale, aside)
        if self.riders is not None and bucket is self.buckets[-1]:
            self.riders.board(bucket.riders)
        bucket.exchange.start(bucket.wire)
        self._go_on(0)

    def _wait(self, number: int) -> None:
        """Until the sums of that bucket are there."""
        bucket = self.buckets[number]
        bucket.exchange.finish(bucket.wire)
        self._go_on(number + 1)

    def _go_on(self, first: int) -> None:
        """Second halves of the buckets that have been sent, in their order, as far as they can begin."""
        if self._second is None:
            return
        for bucket in self.buckets[first : self._sent]:
            if not bucket.exchange.go_on(wait=False):
                return

    # -- hooks

    def _full(self, number: int) -> Callable[[Tensor], None]:
        bucket = self.buckets[number]
        ready = bucket.packer.ready

        def last_arrived(_: Tensor) -> None:
            if self.running and self._sent == number and ready():
                self._send(bucket)
                self._sent = number + 1

        return last_arrived


def _after_accumulation(param: Parameter, hook: Callable[[Tensor], None]) -> Any:
    """Call `hook` whenever backward has written `param.grad`; the handle that it is removed by."""
    required = param.requires_grad
    param.requires_grad_(True)  # torch wants it now, and keeps the hook while it is switched off
    try:
        return param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        param.requires_grad_(required)
