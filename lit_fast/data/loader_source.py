"""A `DataLoader` over a map-style dataset: its position, without reading what was read before; see
`position.py`.

The loader's index sampler is stood in for by `IndexStream` while `iter(loader)` runs, and only then: the
iterator that comes out is torch's own, and draws from the sampler's own iterator behind a C-level chain.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_fast.checkpoint import rng
from lit_fast.data.index_stream import END, IndexStream
from lit_fast.data.order import Rest, Share, check, draw, needs_generators, recipe_of, source_of, unwrapped
from lit_fast.data.randomness import Randomness, State, apply, changes, check_shape, length_of, warn_of_replay
from lit_fast.data.samplers import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from lit_fast.data.sources import stop_workers
from lit_fast.data.worker_rng import WorkerWatch
from lit_fast.errors import DataError
from lit_fast.rank_zero import rank_zero_info

# These draw from the process-wide generator when an epoch begins, and never again in it.
_KNOWN_SAMPLERS = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    type(None),
    UnrepeatedDistributedSampler,
    DistributedSamplerWrapper,
    UnrepeatedDistributedSamplerWrapper,
)


class LoaderSource:
    """See the module's text; `Source` describes the methods."""

    kind = "a DataLoader over a map-style dataset"

    @staticmethod
    def fits(loader: DataLoader[Any]) -> bool:
        """Whether the loader makes its iterators in torch's way, so that its index stream can be advanced."""
        own = type(loader)
        return (
            not isinstance(loader.dataset, IterableDataset)
            and own.__iter__ is DataLoader.__iter__
            and own._get_iterator is DataLoader._get_iterator
            and own._index_sampler is DataLoader._index_sampler
        )

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._workers = loader.num_workers
        self._persistent = loader.persistent_workers and loader.num_workers > 0
        self._iterator: Any = None
        self._watch: WorkerWatch | None = None
        self._seed: torch.Tensor | None = None
        self._skip = 0  # items left out at the beginning of this epoch
        self._random = self._randomness()
        self._share = Share.of(loader)
        self._recipe: State = {}
        self._dealt: State | None = None  # where in the epoch its rest was dealt out anew, in which random state
        self._stream = IndexStream(self._index_sampler(), self._random, self._seed_generator())
        self._start: State = {}
        dataset = loader.dataset
        has_state = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._dataset: Any = dataset if has_state and not self._workers else None
        samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        self._known_samplers = all(type(sampler) in _KNOWN_SAMPLERS for sampler in samplers)

    @property
    def prefetch_safe(self) -> bool:
        return self._workers > 0 and self._known_samplers

    def begin(self, skip: int = 0) -> Iterator[Any]:
        self._random = self._randomness()
        self._recipe, self._dealt = recipe_of(self._loader, self._random), None
        self._start, self._skip = self._random.capture(), skip
        self._stream = IndexStream(self._index_sampler(), self._random, self._seed_generator(), skip)
        return self._iterate(None)

    def _randomness(self) -> Randomness:
        loader = self._loader
        return Randomness(
            generator=loader.generator,
            sampler=unwrapped(source_of(loader)),  # found on the same path, shared out or not
            batch_sampler=loader.batch_sampler,
            dataset=loader.dataset,
            collate_fn=loader.collate_fn,
        )

    def _index_sampler(self) -> Any:
        return self._loader._index_sampler

    def _seed_generator(self) -> torch.Generator:
        generator: torch.Generator | None = self._loader.generator
        return torch.default_generator if generator is None else generator

    def _iterate(self, initial: list[torch.Tensor | None] | None) -> Iterator[Any]:
        """`iter(loader)` with the index stream, and new workers with a watch, in place."""
        loader, stream = self._loader, self._stream
        running = loader._iterator if self._persistent else None
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = self._index_sampler()
        with ExitStack() as undo:
            if self._workers and running is None:
                self._watch = WorkerWatch.of(loader, initial)
                undo.enter_context(self._watch.installed(loader))
            elif running is not self._iterator:
                self._watch = None  # workers that were started before this position took over
            stream.watch = self._watch
            # DataLoader forbids setting these attributes, for they must not change between epochs; they do
            # not
            loader.__dict__[name] = stream
            undo.callback(loader.__dict__.__setitem__, name, sampler)
            if running is not None:
                running._index_sampler = stream
            iterator: Any = iter(loader)
        iterator._index_sampler = sampler
        if running is None:
            self._seed = stream.seed
        self._iterator = iterator
        return iterator  # type: ignore[no-any-return]

    def resume(self, state: State) -> Iterator[Any]:
        before = rng.capture(cuda=False)
        self._random = self._randomness()
        if self._dataset is not None and state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        differs = self._differs(state)
        if state["finished"] and (differs or not self._persistent):
            self._random.restore_own(self._random.known(state["own"]) if differs else state["own"])
            return iter(())
        try:
            return self._deal_anew(state) if differs else self._go_on(state)
        finally:
            rng.restore(before)

    def _differs(self, state: State) -> bool:
        """Whether the epoch is shared out, or batched, otherwise than in the saved run: its rest is dealt out anew."""
        order = state.get("order")
        if order is None:
            return False
        now, then = recipe_of(self._loader, self._random), order["recipe"]
        seeds = any(now[name] != then[name] for name in ("seed", "shuffle") if name in now and name in then)
        return seeds or order["share"] != self._share.state()

    def _deal_anew(self, state: State) -> Iterator[Any]:
        order, consumed = state["order"], int(state["consumed"])
        if self._persistent:
            self._loader._iterator = None
        if not order["seen"]:
            self._random.restore_own(self._random.known(state["own"]))
            return self.begin()
        recipe = order["recipe"]
        generators = None if order["dealt"] is None else order["dealt"]["generators"]
        if generators is None and needs_generators(recipe):
            generators = apply(state["start"], state["draw"])
        batches = self._draw_rest(recipe, order["seen"], generators)
        drawn = {} if generators is None else changes(generators, {"own": self._random.capture_own()})["own"]
        self._random.restore_own({**self._random.known(state["own"]), **drawn})
        self._recipe, self._dealt = recipe, {"seen": order["seen"], "consumed": consumed, "generators": generators}
        self._start, self._skip = self._random.capture(), consumed
        self._stream = IndexStream(batches, self._random, self._seed_generator())
        self._say_dealt(order)
        return self._iterate(None)

    def _draw_rest(self, recipe: State, seen: int, generators: State | None) -> Rest:
        before = rng.capture(cuda=False)
        units = draw(recipe, self._loader, self._random, generators)
        rng.restore(before)
        return Rest(self._share.deal(units[seen:]), recipe["sampler"])

    def _say_dealt(self, order: State) -> None:
        units, seen, share = order["recipe"]["units"], order["seen"], self._share
        repeated = share.repeated(max(0, units - seen))
        rank_zero_info(
            "Going on inside an epoch: %d of its %d %s were seen by %s, and what is left is dealt out to %s%s.",
            min(seen, units),
            units,
            order["recipe"]["unit"],
            *(f"{n} process{'es' if n > 1 else ''}" for n in (order["share"]["replicas"], share.replicas)),
            f", and {repeated} of it twice, so that every process has a last batch" if repeated else "",
        )

    def _go_on(self, state: State) -> Iterator[Any]:
        order = state.get("order") or {"recipe": recipe_of(self._loader, self._random), "dealt": None}
        self._recipe, self._dealt = order["recipe"], order["dealt"]
        source, begun = self._index_sampler(), 0
        if self._dealt is not None:
            source = self._draw_rest(self._recipe, self._dealt["seen"], self._dealt["generators"])
            begun = self._dealt["consumed"]
        skip, initial = self._plan(state)
        self._start, self._skip = state["start"], skip
        drawn = None if state["draw"] is None else apply(self._start, state["draw"])
        self._random.restore(self._start)
        self._stream = IndexStream(
            source,
            self._random,
            self._seed_generator(),
            skip - begun,
            drawn,
            state["first"],
            state["seed"],
        )
        if self._persistent:
            self._loader._iterator = None  # workers of an earlier run in this process have drawn already
        iterator = self._iterate(initial)
        if drawn is not None:
            self._stream.begin()
        for _ in range(state["consumed"] - skip):
            if next(iterator, END) is END:
                raise DataError(
                    f"the checkpoint is {state['consumed']} batches into an epoch, which ended before; "
                    "resume with the data of the saved run"
                )
        if state["all_consumed"]:
            # else a batch that was fetched ahead comes again, and with it what its indices draw
            self._random.restore_own(state["own"])
        return iterator

    def _plan(self, state: State) -> tuple[int, list[torch.Tensor | None] | None]:
        """Items to leave out, and the random state in which each worker begins."""
        consumed, workers = int(state["consumed"]), state["workers"]
        then = 0 if workers is None else workers["count"]
        if then != self._workers:
            if workers is None or workers["drawn"] or workers["hidden"]:
                warnings.warn(
                    f"num_workers was {then} and is {self._workers}: the batches repeat, but random numbers "
                    f"drawn while loading them do not; set num_workers={then} to resume exactly",
                    stacklevel=6,
                )
            return consumed, None
        if workers is None:
            return consumed, None
        if not workers["watched"]:
            warnings.warn(
                "the loader's persistent workers had been started before training took the loader over, so "
                "their random state is not known: what they draw does not repeat",
                stacklevel=6,
            )
            return consumed, None
        if not self._loader.in_order:
            warnings.warn("a DataLoader with in_order=False has no order to go on in; set in_order=True", stacklevel=6)
            return consumed, None
        if workers["hidden"]:
            warn_of_replay(consumed, "the dataset draws in its workers from a generator of its own")
            if self._persistent and workers["epochs_before"]:
                warnings.warn(
                    "the dataset's own generator in persistent workers goes on from epoch to epoch, and is "
                    "not saved: what it draws does not repeat; draw from torch's, numpy's or Python's own to "
                    "resume exactly",
                    stacklevel=6,
                )
            return 0, None
        return int(workers["skip"]), workers["states"]

    def handed_out(self) -> int:
        return self._skip + int(self._iterator._num_yielded)

    def state(self, consumed: int, finished: bool) -> State:
        stream = self._stream
        return {
            "start": self._start,
            "draw": None if stream.draw is None else changes(self._start, stream.draw),
            "first": stream.first,
            "seed": self._seed if self._persistent else None,
            "own": self._random.capture_own(),
            "all_consumed": consumed == self.handed_out(),
            "dataset": None if self._dataset is None else self._dataset.state_dict(),
            "workers": self._worker_state(consumed) if self._workers else None,
            "order": self._order(consumed),
            "shape": self._shape(),
        }

    def _order(self, consumed: int) -> State:
        """The place in the order that all processes share: how much of it they have seen together."""
        dealt = self._dealt or {"seen": 0, "consumed": 0}
        return {
            "recipe": self._recipe,
            "share": self._share.state(),
            "seen": dealt["seen"] + (consumed - dealt["consumed"]) * self._share.step,
            "dealt": self._dealt,
        }

    def _worker_state(self, consumed: int) -> State:
        watch, before = self._watch, self._stream.fetched_before
        state: State = {"count": self._workers, "watched": watch is not None, "drawn": False, "hidden": False}
        if watch is None or before is None:
            return state
        # Tasks go to the workers in turn, so after `rounds` each has done as many; what is left of a round is
        # fetched again, so that every worker goes on with the tasks that it would have had.
        rounds = (consumed - self._skip) // self._workers
        state.update(
            drawn=watch.drawn,
            hidden=watch.hidden,
            skip=self._skip + rounds * self._workers,
            states=None,
            epochs_before=bool(before.any()),
        )
        if watch.drawn and not watch.hidden and self._loader.in_order:
            state["states"] = watch.states(before + rounds)
            if state["states"] is None:
                raise DataError(
                    f"consumed={consumed} is too far behind the {self.handed_out()} batches that were handed "
                    "out: the workers' random states of that moment are gone; save before fetching so far "
                    "ahead"
                )
        return state

    def _shape(self) -> State:
        loader = self._loader
        return {
            "the dataset's length": length_of(loader.dataset),
            "the number of batches": length_of(loader),
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "the sampler": type(loader.sampler).__qualname__,
            "the batch sampler": type(loader.batch_sampler).__qualname__,
        }

    def check(self, state: State) -> None:
        if self._differs(state):
            length = "the dataset's length"
            check_shape({length: state["shape"][length]}, self._shape())
            check(state["order"]["recipe"], self._loader)
        else:
            check_shape(state["shape"], self._shape())

    def length(self, state: State) -> int | None:
        order = state.get("order")
        if order is None or not order["seen"] or state["finished"]:
            return None
        if not self._differs(state) and order["dealt"] is None:
            return None
        return int(state["consumed"]) + self._share.batches(max(0, order["recipe"]["units"] - order["seen"]))

    def explain(self) -> str:
        if not self._workers:
            return "a resumed run skips the indices of the batches before its position and reads no sample"
        if self._watch is not None and self._watch.hidden:
            return (
                "the dataset draws in its workers from a generator of its own: a resumed run fetches every "
                "batch before its position again (replay)"
            )
        return (
            "a resumed run skips the indices of the batches before its position and restores the random "
            f"state of its {self._workers} workers, reading at most {self._workers - 1} batches again"
        )

    def close(self) -> None:
        stop_workers(self._iterator)
        if self._persistent:
            self._loader._iterator = None
