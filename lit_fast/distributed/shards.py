"""Parameters in flat memory, of which each rank keeps and steps one segment.

The parameters of a bucket lie side by side, cut into one segment a rank (`ops.lay_out_buckets`). Gradients travel in
the same order: `GradientShards` sums them so that each rank gets its own segment of the mean alone, its optimizer steps
views of its own segment of the parameters, and `FlatBucket.gather` brings the others' back.

Nobody waits for that until a parameter is used: while a bucket is under way its parameters are of a class whose
`__torch_function__` waits for it, whoever touches one first: a layer's forward, a hook, a checkpoint. Touched, they are
plain parameters again. So the gather hides behind whatever does not need it, and nothing can read half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.distributed.buckets import EVERYTHING, RIDERS, GradientBuckets, Riders
from lit_fast.distributed.flights import Flights
from lit_fast.distributed.learning import BucketSizes, Members, dtype_of_gradient
from lit_fast.distributed.timing import processor_moves_bytes

# torch has renamed them since 2.8, and warns of the old names.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SHORT = (torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """A run of a parameter's elements, in the order of its memory, that one rank keeps.

    Attributes:
        slot: of the parameter in its bucket.
        begin, length: its first element in the parameter, and how many.
        place: of that element in the bucket's flat memory.
        rank: who keeps it.
    """

    slot: int
    begin: int
    length: int
    place: int
    rank: int


def _part(layout: ops.BucketLayout, slot: int, begin: int, wire: int, length: int) -> Part:
    rank, place = divmod(wire, layout.stride)
    return Part(slot, begin, length, rank * layout.segment + place, rank)


class _UnderWay(Parameter):
    """A parameter whose newest values are under way; each bucket has a class of its own."""

    arrive: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for kind in types:
            if issubclass(kind, _UnderWay):
                kind.arrive()
        return func(*args, **(kwargs or {}))  # they are plain parameters now


class FlatBucket:
    """Some parameters of one dtype, moved into flat memory, of which this rank keeps a segment.

    Attributes:
        sends: whether one of the parameters is trained: otherwise nothing travels.
        parts: of all ranks, in the order of flat memory.
        own: those of this rank.
        shards: a 1-D parameter for each of `own`: a view of the flat memory, and so of the model's parameter.

    Raises:
        KernelError: a parameter is not dense in memory, or of a dtype without kernels. Nothing was moved.
    """

    def __init__(self, layout: ops.BucketLayout, params: Sequence[Parameter], names: Sequence[str], group: Any) -> None:
        self.layout, self.params, self.names, self.group = layout, list(params), list(names), group
        rank = dist.get_rank(group)
        self.packer = ops.Packer(self.params, layout.pieces, layout.used_flags, layout.size, self.names)
        first = self.params[0]
        self.flat = torch.zeros(layout.dense_size, dtype=first.dtype, device=first.device)
        self.kept = self.flat[rank * layout.segment : (rank + 1) * layout.segment]
        self.parts = [_part(layout, *piece) for piece in layout.pieces]
        self.own = [part for part in self.parts if part.rank == rank]
        self.move_in()
        self.shards = [Parameter(self.flat[part.place : part.place + part.length]) for part in self.own]
        self.sends = True
        self.work: Any = None
        self._class = type("UnderWay", (_UnderWay,), {"arrive": staticmethod(self.arrive)})

    @torch.no_grad()
    def move_in(self) -> None:
        """Make every parameter a view of the flat memory, where it is none, with the values that it has."""
        for p, (_, offset) in zip(self.params, self.layout.slots, strict=True):
            if p.data_ptr() != self.flat.data_ptr() + offset * self.flat.itemsize:
                view = torch.as_strided(self.flat, p.size(), p.stride(), offset)
                view.copy_(p)
                p.data = view

    @property
    def can_wait(self) -> bool:
        """Whether nobody need wait for `gather` at once: not where a parameter is of a class of its own."""
        return all(type(p) is Parameter for p in self.params)

    def gather(self, hidden: bool) -> None:
        """Bring all segments to all ranks; `hidden`: it is waited for when a parameter is used."""
        hidden = hidden and self.can_wait
        self._send()
        if not hidden:
            self.arrive()
            return
        for p in self.params:
            p.__class__ = self._class

    def _send(self) -> None:
        self.work = _all_gather(self.flat, self.kept, group=self.group, async_op=True)

    def watch(self, flights: Flights | None, number: int) -> None:
        """Tell a profiler of each gather from here on, or no longer."""
        vars(self).pop("_send", None)
        if flights is not None:
            flights.watch(self, "_send", "work", "all_gather", "parameters", self.flat.nbytes, number)

    def arrive(self) -> None:
        """Wait for what is under way."""
        if self.work is None:
            return
        work = self.give_up()
        work.wait()
        torch.autograd.graph.increment_version(self.params)

    def give_up(self) -> Any:
        """Wait no longer; what was under way."""
        work, self.work = self.work, None
        for p in self.params:
            if type(p) is self._class:
                p.__class__ = Parameter
        return work


def lay_out(params: Sequence[Parameter], names: Sequence[str], group: Any, sizes: BucketSizes) -> list[FlatBucket]:
    """Move parameters into flat buckets in the reverse of their order, in which most gradients arrive.

    Where they lie decides who keeps what, so it never changes. Each dtype has buckets of its own, and frozen parameters
    have: a bucket of those is neither sent nor gathered.
    """
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for index, p in reversed(list(enumerate(params))):
        kinds.setdefault((p.device, p.dtype, p.requires_grad), []).append(index)
    buckets = []
    for (_, dtype, _), members in kinds.items():
        numels = [params[index].numel() for index in members]
        capacities = {"first_capacity": sizes.first // dtype.itemsize, "capacity": sizes.rest // dtype.itemsize}
        filled = ops.lay_out_buckets(numels, **{name: max(1, number) for name, number in capacities.items()})
        for inside in ([members[index] for index, _ in layout.slots] for layout in filled):
            [layout] = ops.lay_out_buckets(
                [params[index].numel() for index in inside], first_capacity=EVERYTHING, capacity=EVERYTHING,
                segments=dist.get_world_size(group), flags=1, last_flags=RIDERS,
            )  # fmt: skip
            buckets.append(
                FlatBucket(layout, [params[index] for index in inside], [names[index] for index in inside], group)
            )
    return buckets


class GradientShard:
    """The gradients of a `FlatBucket`: all of this rank's on the wire, and its segment of the mean."""

    def __init__(self, home: FlatBucket, members: list[int | None], wire_dtype: torch.dtype | None) -> None:
        self.home, self.members, self.packer = home, members, home.packer
        layout, device = home.layout, home.flat.device
        grad_dtype = dtype_of_gradient(home.params[0])
        self.wire = torch.zeros(layout.size, dtype=wire_dtype or grad_dtype, device=device)
        self.by_rank = self.wire.view(layout.segments, layout.stride)
        self.mean = torch.zeros(layout.stride, dtype=grad_dtype, device=device)
        # 16 bits are summed in float32, here; NCCL and Gloo would round each sum.
        sums_here = self.wire.dtype in _SHORT
        self.received = torch.empty_like(self.by_rank) if sums_here else None
        # torch's Gloo would sum a copy of all segments by an all-reduce, and could not say when it was over.
        self.sums_all = not sums_here and processor_moves_bytes(home.group, device)
        rank = dist.get_rank(home.group)
        self.own = self.by_rank[rank]
        first = rank * layout.segment
        self.views = [self.mean[part.place - first : part.place - first + part.length] for part in home.own]
        self.used = self.mean[layout.flag_offset : layout.last_flag_offset]
        self.riders = self.mean[layout.last_flag_offset : layout.last_flag_offset + RIDERS]
        self.seats = self.by_rank[:, layout.last_flag_offset : layout.last_flag_offset + RIDERS]
        trained = [p for p in home.params if p.requires_grad]
        self.last = trained[-1]
        self.is_ready = (
            home.packer.ready if len(trained) == len(home.params) else lambda: all(p.grad is not None for p in trained)
        )
        self.missing: list[int] = []
        self.work: Any = None
        self.before: list[Tensor | None] | None = None
        for shard in home.shards:
            if dtype_of_gradient(shard) != grad_dtype:
                shard.grad_dtype = grad_dtype

    def set_aside(self) -> None:
        """Keep what an earlier backward left in the shards, to be added to."""
        grads = [shard.grad for shard in self.home.shards]
        self.before = None
        if any(grad is not None for grad in grads):
            self.before = [None if grad is None else grad.clone() for grad in grads]

    def send(self) -> None:
        if self.sums_all:
            self.work = dist.all_reduce(self.wire, group=self.home.group, async_op=True)
        elif self.received is None:
            self.work = _reduce_scatter(self.mean, self.wire, group=self.home.group, async_op=True)
        else:  # Gloo moves bytes of every dtype
            into, sent = self.received.view(-1).view(torch.uint8), self.wire.view(torch.uint8)
            self.work = dist.all_to_all_single(into, sent, group=self.home.group, async_op=True)

    def watch(self, flights: Flights, number: int) -> None:
        collective = "all_to_all" if self.received is not None else "all_reduce" if self.sums_all else "reduce_scatter"
        flights.watch(self, "send", "work", collective, "gradients", self.wire.nbytes, number)

    def wait(self) -> None:
        self.work.wait()
        self.work = None
        if self.sums_all:
            self.mean.copy_(self.own)
        elif self.received is not None:
            ops.sum_pieces(self.received, self.mean)

    def hand_out(self) -> None:
        """Give each shard its gradient; None where no rank has one."""
        unused: set[int] = set()
        if self.missing:
            used = self.used.tolist()  # waits for a GPU, only where a gradient is missing here
            unused = {slot for slot in self.missing if used[slot] == 0.0}
        for number, (shard, part, view) in enumerate(zip(self.home.shards, self.home.own, self.views, strict=True)):
            before = None if self.before is None else self.before[number]
            if before is not None:
                view.add_(before)  # of an unused one the mean is zero
            shard.grad = None if part.slot in unused and before is None else view


class GradientShards(GradientBuckets):
    """As `GradientBuckets`, but each rank gets its own segment of the mean, in `shard.grad` of the buckets' shards.

    Args:
        homes: where the parameters lie. Those of frozen parameters alone are left out.
        group, wire_dtype, riders: as of `GradientBuckets`.
    """

    buckets: list[GradientShard]  # type: ignore[assignment]
    exchanges = False

    def __init__(
        self,
        homes: Sequence[FlatBucket],
        group: Any,
        *,
        wire_dtype: torch.dtype | None = None,
        riders: Riders | None = None,
    ) -> None:
        trained = {
            p: name for home in homes for p, name in zip(home.params, home.names, strict=True) if p.requires_grad
        }
        index_of = {p: index for index, p in enumerate(trained)}
        self.buckets = [GradientShard(home, [index_of.get(p) for p in home.params], wire_dtype) for home in homes]
        each_alone = BucketSizes(1, 1)  # so that the order of arrival is learned, and nothing else
        names = list(trained.values())
        super().__init__(list(trained), group, sizes=each_alone, riders=riders, names=names)

    def lay_out(self, buckets: Members) -> None:
        """What lies where is settled: learn only who comes last in its bucket, and which bucket is full first."""
        place = {index: number for number, index in enumerate(index for members in buckets for index in members)}
        last: dict[GradientShard, int] = {}
        for bucket in self.buckets:
            index = max((index for index in bucket.members if index is not None), key=place.__getitem__)
            bucket.last, last[bucket] = self.params[index], place[index]
        self.buckets.sort(key=last.__getitem__)

    def begin(self) -> None:
        for bucket in self.buckets:
            bucket.set_aside()
        super().begin()

    def finish(self) -> None:
        super().finish()
        for bucket in self.buckets:
            bucket.home.arrive()  # what no forward has used

    def _send(self, bucket: GradientShard) -> None:  # type: ignore[override]
        held = self._aside
        aside = None if held is None else [None if index is None else held[index] for index in bucket.members]
        bucket.missing = bucket.packer.pack(bucket.wire, self.scale, aside)
        if self.riders is not None and bucket is self.buckets[-1]:
            self.riders.board(bucket.seats)
        bucket.send()

    def _wait(self, number: int) -> None:
        self.buckets[number].wait()

    def watch(self, flights: Flights) -> None:
        for number, bucket in enumerate(self.buckets):
            bucket.watch(flights, number)

    def _hand_out(self, bucket: GradientShard) -> None:  # type: ignore[override]
        bucket.hand_out()

    def _full(self, number: int) -> Callable[[Tensor], None]:
        bucket = self.buckets[number]

        def last_arrived(_: Tensor) -> None:
            if self.running and self._sent == number and bucket.is_ready():
                self._send(bucket)
                self._sent = number + 1

        return last_arrived
