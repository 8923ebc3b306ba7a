"""A `torch.optim` object that steps this rank's shards of the parameters, and its state as the whole ones have it.

The object stays the owner of options and state, but its param groups hold 1-D parameters: views of what this rank keeps
(`distributed/shards.py`). So its state is 1/N. What is saved is what a process with whole parameters would save, under
the same indices, and loads at any number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lit_fast import ops
from lit_fast.distributed.flights import Flights
from lit_fast.distributed.learning import BucketSizes
from lit_fast.distributed.shards import FlatBucket, Part, lay_out
from lit_fast.errors import MisconfigurationException
from lit_fast.optim.codes import CODE_BLOCK
from lit_fast.optim.mapping import mapping_of
from lit_fast.optim.storage import needs_steps

Names = Callable[[], Mapping[Parameter, str]]


class ShardedOptimizer:
    """Puts shards into the param groups of `optimizer`, and keeps what belongs to them.

    Attributes:
        whole: the model's parameters of each param group, in its order.
        buckets: where they lie.

    Args:
        optimizer: whose update of an element looks at that element alone.
        names: `names()`: the model's parameters, in the order of registration, and what they are called.
        group: the ranks.
        sizes: of buckets.

    Raises:
        MisconfigurationException: the optimizer looks at whole tensors, or has no compiled step; a parameter is not the
            model's, or in two param groups.
    """

    def __init__(self, optimizer: Optimizer, names: Names, group: Any, sizes: BucketSizes) -> None:
        mapping, why_not = mapping_of(optimizer)
        name = type(optimizer).__name__
        if mapping is None or mapping.whole_tensors:
            why_not = why_not or "it looks at whole tensors, of which a process has parts"
            raise MisconfigurationException(
                f"strategy='zero1' cannot shard {name}: {why_not}. Use AdamW, Adam, SGD, Lion, Adagrad or RMSprop (of "
                f"torch.optim or lit_fast.optim), or strategy='ddp' with {name}."
            )
        self.optimizer, self._names, self.group, self._sizes = optimizer, names, group, sizes
        self.whole: list[list[Parameter]] = []
        self.buckets: list[FlatBucket] = []
        self._shards: dict[Parameter, list[tuple[Parameter, Part]]] = {}  # of each of the model's, on this rank
        self._parts: dict[Parameter, list[Part]] = {}  # ... on all of them
        self._whole_of: dict[Parameter, Parameter] = {}  # of each shard
        self._partials = torch.zeros(0, dtype=torch.float64)
        self.take_in()
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]

    # -- which parameters

    def take_in(self) -> None:
        """Lay out what param groups hold of the model's: all at first, later what was added."""
        new: list[Parameter] = []
        for number, params in enumerate(self.groups_of_whole()):
            if number == len(self.whole):
                self.whole.append([])
            new += params[len(self.whole[number]) :]
            self.whole[number] = params
        if new:
            self._lay_out(new)
        if any(p in self._parts for group in self.optimizer.param_groups for p in group["params"]):
            self._show_shards()

    def _lay_out(self, new: list[Parameter]) -> None:
        order = {p: (number, name) for number, (p, name) in enumerate(self._names().items())}
        for p in new:
            if p not in order or p in self._parts:
                what = f"a parameter of shape {tuple(p.shape)} that is not in the model"
                if p in order:
                    what = f"{order[p][1]} in two param groups"
                raise MisconfigurationException(
                    f"strategy='zero1': {type(self.optimizer).__name__} holds {what}. Give each of the model's "
                    f"parameters to one optimizer, once."
                )
        new.sort(key=lambda p: order[p][0])
        buckets = lay_out(new, [order[p][1] for p in new], self.group, self._sizes)
        for bucket in buckets:
            mine = dict(zip(bucket.own, bucket.shards, strict=True))
            for slot, p in enumerate(bucket.params):
                self._parts[p] = [part for part in bucket.parts if part.slot == slot]
                self._shards[p] = [(mine[part], part) for part in self._parts[p] if part in mine]
            self._whole_of.update((shard, bucket.params[part.slot]) for part, shard in mine.items())
        self.buckets += buckets
        for p in new:
            entry = self.optimizer.state.pop(p, None)
            for shard, part in self._shards[p] if entry else ():
                self.optimizer.state[shard] = {key: _cut(key, value, p, part) for key, value in entry.items()}
        self._count_chunks()

    def groups_of_whole(self) -> list[list[Parameter]]:
        """The model's parameters of each param group as it is now, those that were added at the end."""
        held = []
        for number, group in enumerate(self.optimizer.param_groups):
            params = dict.fromkeys(self.whole[number] if number < len(self.whole) else ())
            params.update(dict.fromkeys(self._whole_of.get(p, p) for p in group["params"]))
            held.append(list(params))
        return held

    def _show_shards(self) -> None:
        firsts = iter(ops.first_indices([p.numel() for p in self._in_order()]))
        for group, params in zip(self.optimizer.param_groups, self.whole, strict=True):
            starts = [(p, next(firsts)) for p in params]
            held = [(shard, first + part.begin) for p, first in starts for shard, part in self._shards[p]]
            group["params"] = [shard for shard, _ in held]
            if needs_steps(group):
                group["first_indices"] = [first for _, first in held]
            if "param_names" in group:
                names = self._names()
                group["param_names"] = [names[p] for p in params for _ in self._shards[p]]

    def _in_order(self) -> list[Parameter]:
        return [p for params in self.whole for p in params]

    def named_shards(self) -> Iterator[tuple[str, Parameter]]:
        for bucket in self.buckets:
            for shard, part in zip(bucket.shards, bucket.own, strict=True):
                yield bucket.names[part.slot], shard

    # -- a step

    def gather(self, hidden: bool) -> None:
        """Bring what each rank has stepped to all; the bucket that the next forward uses first comes first."""
        for bucket in reversed(self.buckets):
            if bucket.sends:
                bucket.gather(hidden)

    def arrive(self) -> None:
        """Wait for what is under way."""
        for bucket in self.buckets:
            bucket.arrive()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that no backward has reduced yet are in the model's own parameters."""
        type(self.optimizer).zero_grad(self.optimizer, set_to_none)
        for bucket in self.buckets:
            if bucket.work is None:  # else nothing has run since the step
                for p in bucket.params:
                    p.grad = None

    # -- the norm of the gradients of all ranks

    def _count_chunks(self) -> None:
        chunk, total = ops.square_chunk(), 0
        self._place: dict[Parameter, int] = {}  # of a shard's first partial sum
        for p in self._in_order():
            for shard, part in self._shards[p]:
                self._place[shard] = total + part.begin // chunk
            total += -(-p.numel() // chunk)
        device = self.buckets[0].flat.device
        self._partials = torch.zeros(total, dtype=torch.float64, device=device)

    def norm(self, grad_scale: float | Tensor = 1.0) -> Tensor:
        """The L2 norm of all gradients times `grad_scale`: the bits that `ops.gradient_norm` has for whole ones.

        A partial sum comes from one rank, and zeros from the others.
        """
        self._partials.zero_()
        held = [(shard.grad, place) for shard, place in self._place.items() if shard.grad is not None]
        ops.squares([grad for grad, _ in held], [place for _, place in held], self._partials)
        self._sum_partials()
        return ops.norm_of(self._partials, grad_scale)

    def _sum_partials(self) -> None:
        dist.all_reduce(self._partials, group=self.group)

    def watch(self, flights: Flights | None) -> None:
        """Tell a profiler of what is sent from here on, or no longer."""
        for method, what in {"_sum_partials": "norm", "_of_ranks": "optimizer state"}.items():
            vars(self).pop(method, None)
            if flights is not None:
                setattr(self, method, flights.timed(getattr(self, method), what))
        for number, bucket in enumerate(self.buckets):
            bucket.watch(flights, number)

    def clip_by_norm(self, max_norm: float) -> None:
        """Scale this rank's gradients in place, as all ranks do."""
        ops.scale_gradients_(self.optimizer.param_groups, ops.clip_coefficient(self.norm(), max_norm))

    # -- state

    def elements(self) -> tuple[int, int]:
        """How many this rank keeps, of how many."""
        kept = sum(part.length for bucket in self.buckets for part in bucket.own)
        return kept, sum(p.numel() for p in self._in_order())

    def state_dict(self) -> dict[str, Any]:
        """On the first rank what `optimizer.state_dict()` is with whole parameters; on the others without states.

        All ranks must call it. Only the first one holds more than one parameter's state beyond its own.
        """
        optimizer, whole = self.optimizer, self._gathered()
        state, shown = optimizer.state, [dict(group) for group in optimizer.param_groups]
        names = self._names()
        try:
            optimizer.state = whole
            for group, params in zip(optimizer.param_groups, self.whole, strict=True):
                group["params"] = params
                group.pop("first_indices", None)
                if "param_names" in group:
                    group["param_names"] = [names[p] for p in params]
            saved: dict[str, Any] = optimizer.state_dict()
        finally:
            optimizer.state = state
            for group, before in zip(optimizer.param_groups, shown, strict=True):
                group.update(before)
        return saved

    def _gathered(self) -> defaultdict[Tensor, Any]:
        rank, state = dist.get_rank(self.group), self.optimizer.state
        params = self._in_order()
        own: dict[int, dict[str, Any]] = {}
        for index, p in enumerate(params):
            for shard, _ in self._shards[p][:1]:
                own[index] = {key: _kind_of(key, value) for key, value in state.get(shard, {}).items()}
        of_ranks = self._of_ranks(own)
        gathered: defaultdict[Tensor, Any] = defaultdict(dict)
        for index, p in enumerate(params):
            known = next((kinds[index] for kinds in of_ranks if kinds.get(index)), {})
            for key, kind in known.items():
                value = kind if not isinstance(kind, torch.dtype) else self._joined(p, key, kind)
                if rank == 0:
                    gathered[p][key] = value
        return gathered

    def _of_ranks(self, own: dict[int, dict[str, Any]]) -> list[dict[int, dict[str, Any]]]:
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, own, group=self.group)
        return found

    def _joined(self, p: Parameter, key: str, dtype: torch.dtype) -> Tensor | None:
        """One state of a parameter, from those who keep its parts, in the first rank."""
        own = {part: self.optimizer.state[shard][key] for shard, part in self._shards[p]}
        if dist.get_rank(self.group) != 0:
            for part in own:
                dist.send(own[part], group=self.group, group_dst=0)
            return None
        unit = _unit_of(key)
        whole = torch.empty(-(-p.numel() // unit), dtype=dtype, device="cpu")
        for part in self._parts[p]:
            into = whole[part.begin // unit : -(-(part.begin + part.length) // unit)]
            if part.rank == 0:
                into.copy_(own[part])
            else:
                piece = into if p.is_cpu else torch.empty_like(into, device=p.device)
                dist.recv(piece, group=self.group, group_src=part.rank)
                if piece is not into:
                    into.copy_(piece)
        return whole if unit != 1 else torch.as_strided(whole, p.size(), p.stride())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take this rank's parts of what a process with whole parameters has saved. All ranks must call it.

        Raises:
            ValueError: it is of other param groups or shapes.
        """
        groups = saved["param_groups"]
        if [len(group["params"]) for group in groups] != [len(params) for params in self.whole]:
            raise ValueError(
                f"its param groups hold {[len(group['params']) for group in groups]} parameters, and this run's "
                f"{[len(params) for params in self.whole]}"
            )
        count, state, cut = 0, {}, []
        for group, params in zip(groups, self.whole, strict=True):
            first = count
            for index, p in zip(group["params"], params, strict=True):
                for _, part in self._shards[p]:
                    entry = saved["state"].get(index)
                    if entry:
                        state[count] = {key: _cut(key, value, p, part) for key, value in entry.items()}
                    count += 1
            cut.append({**group, "params": list(range(first, count))})
        self.optimizer.load_state_dict({**saved, "state": state, "param_groups": cut})
        self._show_shards()
        self.gather(hidden=False)  # a loaded master weight may have changed what this rank keeps


def _unit_of(key: str) -> int:
    """Elements that one number of a state is of."""
    return CODE_BLOCK if key.endswith("_scale") else 1


def _kind_of(key: str, value: Any) -> Any:
    """The dtype of a state that has a number for each element (or block of them), or what it is, all the same."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.dtype
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _cut(key: str, value: Any, p: Tensor, part: Part) -> Any:
    """A shard's part of one state of a parameter."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" or (value.dim() == 0 and p.dim() > 0):
        return value.clone()  # each shard counts its own
    unit = _unit_of(key)
    begin, end = part.begin // unit, -(-(part.begin + part.length) // unit)
    if unit == 1:
        if value.shape != p.shape:
            raise ValueError(f"{key} has the shape {tuple(value.shape)}, and its parameter {tuple(p.shape)}")
        if value.stride() != p.stride():
            value = torch.empty_strided(p.size(), p.stride(), dtype=value.dtype, device=value.device).copy_(value)
        value = torch.as_strided(value, (p.numel(),), (1,))
    return value[begin:end].clone()
