"""The order of an epoch over a map-style data set, and the part of it that a process reads.

All processes of a run read one order in turns: process r of W takes every W-th sample, from the r-th on. So after c
batches of B samples in each process, what was seen is the order's first c * B * W samples, whichever process saw
which. That number is a place in the epoch which knows no processes and no batches: the rest of the order can be dealt
out anew, in the same turns, among any number of processes and in batches of any size, again and again.

An order is not kept but drawn again, from a recipe (`recipe_of`): seed and epoch of a `DistributedSampler`, or the
state of the generators when a sampler began to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lit_fast.checkpoint import rng
from lit_fast.data.randomness import Randomness, State, length_of
from lit_fast.data.samplers import DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper, draw_alike
from lit_fast.errors import DataError

# Drawn again by the recipe alone, so that one of these may take the place of another; the others need the sampler.
_DRAWN_AGAIN = {"distributed": DistributedSampler, "random": RandomSampler, "sequential": SequentialSampler}
_WRAPPERS = (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)


def source_of(loader: DataLoader[Any]) -> Any:
    """What gives a loader the units of its order: samples, or batches where they are grouped in a way of their own."""
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None:
        return loader.sampler
    return batch_sampler.sampler if _groups_in_turn(batch_sampler) else batch_sampler


def _groups_in_turn(batch_sampler: Any) -> bool:
    return isinstance(batch_sampler, BatchSampler) and type(batch_sampler).__iter__ is BatchSampler.__iter__


def unwrapped(source: Any) -> Any:
    """The program's own sampler, behind the one that deals out what it gives."""
    return source.sampler if isinstance(source, _WRAPPERS) else source


@dataclass(frozen=True)
class Share:
    """Which units of an order a process reads, and in which batches.

    Args:
        replicas, rank: of how many that share the order, and which one.
        batch_size: units in a batch; None where a unit is what one batch is made of.
        drop_last: whether a last, smaller batch is left out.
        even: whether the last units are left out that not every process would get one of.
    """

    replicas: int = 1
    rank: int = 0
    batch_size: int | None = None
    drop_last: bool = False
    even: bool = False

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> Share:
        source: Any = source_of(loader)
        groups: Any = None if source is loader.batch_sampler else loader.batch_sampler
        shared = isinstance(source, DistributedSampler)
        return cls(
            replicas=source.num_replicas if shared else 1,
            rank=source.rank if shared else 0,
            batch_size=None if groups is None else groups.batch_size,
            drop_last=groups is not None and groups.drop_last,
            even=shared and source.drop_last,
        )

    @property
    def step(self) -> int:
        """Units that are seen when every process has read one batch."""
        return self.replicas * (self.batch_size or 1)

    def batches(self, units: int) -> int:
        """Batches of each process, when so many units are dealt out."""
        if self.drop_last:
            return units // self.step
        return math.ceil((units - units % self.replicas if self.even else units) / self.step)

    def repeated(self, units: int) -> int:
        """Processes that get one unit which another one has, too: they would have no last batch else."""
        short = -units % self.replicas
        alone = units // self.replicas % (self.batch_size or 1) == 0  # the last unit of a longer share is a batch
        return short if alone and not (self.drop_last or self.even) else 0

    def deal(self, units: list[Any]) -> list[Any]:
        """This process's batches of the given units: each unit in one process, but for `repeated` ones."""
        if self.drop_last:
            units = units[: self.batches(len(units)) * self.step]
        elif self.even:
            units = units[: len(units) - len(units) % self.replicas]
        mine = units[self.rank :: self.replicas]
        if self.repeated(len(units)) and self.rank >= len(units) % self.replicas:
            mine.append(units[(len(mine) * self.replicas + self.rank) % len(units)])
        if self.batch_size is None:
            return mine
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]

    def state(self) -> State:
        return asdict(self)


class Rest:
    """The batches of an epoch that are left, in the place of the sampler that began it."""

    def __init__(self, batches: list[Any], name: str) -> None:
        self._batches, self.name = batches, name

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def recipe_of(loader: DataLoader[Any], random: Randomness) -> State:
    """How the order of this epoch can be drawn again; loadable with `weights_only=True`."""
    source = source_of(loader)
    inner = unwrapped(source)
    recipe: State = {
        "units": length_of(inner),
        "unit": "batches" if source is loader.batch_sampler else "samples",
        "sampler": type(inner).__qualname__,
    }
    if type(source) in _WRAPPERS:
        return {**recipe, "kind": "wrapped", "seed": source.seed, "epoch": source.epoch}
    if type(source) is DistributedSampler:
        recipe["units"] = length_of(source.dataset)
        return {**recipe, "kind": "distributed", "shuffle": source.shuffle, "seed": source.seed, "epoch": source.epoch}
    if isinstance(source, DistributedSampler):
        return {**recipe, "kind": "unknown"}
    if type(source) is SequentialSampler:
        return {**recipe, "kind": "sequential"}
    if type(source) is RandomSampler:
        own = [path for path, generator in random.own.items() if generator is source.generator]
        recipe.update(kind="random", replacement=source.replacement, samples=len(source.data_source))
        return {**recipe, "generator": own[0] if own else None}
    return {**recipe, "kind": "drawn"}


def needs_generators(recipe: State) -> bool:
    """Whether the order depends on the state of generators, beside the recipe."""
    return recipe["kind"] not in ("distributed", "sequential")


def check(recipe: State, loader: DataLoader[Any]) -> None:
    """Raise DataError if the rest of an epoch cannot be dealt out anew with the loader given now."""
    source = source_of(loader)
    inner = unwrapped(source)
    unit = "batches" if source is loader.batch_sampler else "samples"
    same = recipe["sampler"] == type(inner).__qualname__
    units = length_of(source.dataset if type(source) is DistributedSampler else inner)
    wrong = None
    if recipe["kind"] == "unknown":
        wrong = f"{recipe['sampler']} shares its samples out in a way of its own"
    elif recipe["unit"] != unit:
        wrong = f"the loader's sampler gave {recipe['unit']}, and now gives {unit}"
    elif not same and not (recipe["kind"] in _DRAWN_AGAIN and type(source) in _DRAWN_AGAIN.values()):
        wrong = f"the sampler was {recipe['sampler']} and is {type(inner).__qualname__}"
    elif recipe["units"] is None:
        wrong = f"{recipe['sampler']} has no length"
    elif units is not None and recipe["units"] != units:
        wrong = f"the order's length was {recipe['units']} and is {units}"
    if wrong is not None:
        raise DataError(
            f"the checkpoint is in the middle of an epoch that other processes, or batches of another size, shared "
            f"out, and what is left of it cannot be dealt out anew: {wrong}. Resume with as many processes, the "
            f"same batch size and the same data, or from a checkpoint that was written at the end of an epoch"
        )


def draw(recipe: State, loader: DataLoader[Any], random: Randomness, generators: State | None) -> list[Any]:
    """The whole order of the epoch, without repetitions at its end.

    Leaves the process-wide generators anywhere, and the data's own where they are at the end of that epoch.

    Args:
        generators: their states when the first unit was drawn, as `Randomness.capture` gives them.
    """
    kind = recipe["kind"]
    if kind == "sequential":
        return list(range(recipe["units"]))
    if kind == "distributed":
        whole: DistributedSampler[Any] = DistributedSampler(
            range(recipe["units"]),  # type: ignore[arg-type]
            num_replicas=1,
            rank=0,
            shuffle=recipe["shuffle"],
            seed=recipe["seed"],
        )
        whole.set_epoch(recipe["epoch"])
        return list(whole)
    assert generators is not None
    random.restore({"process": generators["process"], "own": random.known(generators["own"])})
    if kind == "wrapped":
        return draw_alike(unwrapped(source_of(loader)), recipe["seed"] + recipe["epoch"])
    if kind == "drawn":
        return list(unwrapped(source_of(loader)))
    generator = None
    if recipe["generator"] is not None:
        generator = random.own.get(recipe["generator"])
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator()
            rng.restore_generator(generator, generators["own"][recipe["generator"]])
    units = None if recipe["units"] == recipe["samples"] else recipe["units"]
    return list(RandomSampler(range(recipe["samples"]), recipe["replacement"], units, generator))
