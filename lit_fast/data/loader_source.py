"""A `DataLoader` over a map-style dataset: its position, without reading what was read before; see
`position.py`.

The loader's index sampler is stood in for by `_IndexStream` while `iter(loader)` runs, and only then: the
iterator that comes out is torch's own, and draws from the sampler's own iterator behind a C-level chain.
"""

from __future__ import annotations

import collections
import itertools
import warnings
import zlib
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
from lit_fast.data.randomness import Randomness, State, apply, changes, check_shape, length_of, warn_of_replay
from lit_fast.data.samplers import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from lit_fast.data.sources import stop_workers
from lit_fast.data.worker_rng import WorkerWatch
from lit_fast.errors import DataError

_END = object()
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


class _IndexStream:
    """Stands in for the loader's index sampler (it yields what one batch, or without batching one sample,
    is).

    Args:
        source: The sampler.
        random: All generators that it may draw from.
        skip: Items to leave out, when going on.
        draw: State of the generators when the saved run drew its first item; None begins an epoch.
        first: Fingerprint of the saved run's first item.
        seed: State of the generator that the loader draws its workers' seed from, if that was in another
            epoch.
    """

    def __init__(
        self,
        source: Any,
        random: Randomness,
        seed_generator: torch.Generator,
        skip: int = 0,
        draw: State | None = None,
        first: int | None = None,
        seed: torch.Tensor | None = None,
    ) -> None:
        self.source, self.random, self.skip = source, random, skip
        self.draw, self.first, self.seed = draw, first, seed
        self._seed_given = seed is not None
        self.watch: WorkerWatch | None = None
        self.fetched_before: torch.Tensor | None = None  # batches per worker, when the epoch's first item was drawn
        self._seed_generator = seed_generator
        inner = source.sampler if type(source) is BatchSampler else source
        self._name = type(inner).__name__
        self._resuming = draw is not None
        self._items: Iterator[Any] = iter(())
        self._head: list[Any] = []
        self._begun = False

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        self._items = iter(self.source)
        if self._seed_given:
            assert self.seed is not None
            self._seed_generator.set_state(self.seed)
            self._seed_given = False  # iterators with workers call this once more, after they have drawn their seed
        elif self.seed is None:
            self.seed = self._seed_generator.get_state()
        return itertools.chain.from_iterable(self._parts())

    def _parts(self) -> Iterator[Iterator[Any] | list[Any]]:
        self.begin()
        yield self._head
        yield self._items

    def begin(self) -> None:
        """Draw the first item, and leave out `skip`. Runs when the first item is asked for, or before."""
        if self._begun:
            return
        self._begun = True
        if self.watch is not None:
            # no worker is at work now: new ones have no task yet, and old ones have answered that theirs are
            # done
            self.fetched_before = self.watch.fetched()
        if self._resuming:
            assert self.draw is not None
            self.random.restore(self.draw)
        else:
            self.draw = self.random.capture()
        item = next(self._items, _END)
        self._head = [] if item is _END else [item]
        fingerprint = _fingerprint(self._head)
        if self._resuming:
            self._check_first(fingerprint)
        self.first = fingerprint
        if self.skip:
            self._leave_out()

    def _leave_out(self) -> None:
        before = rng.capture(cuda=False)
        left = len(self._head)
        self._head = []
        rest = collections.deque(enumerate(itertools.islice(self._items, self.skip - 1), 2), maxlen=1)  # C speed
        left = rest[0][0] if rest else left
        if left < self.skip:
            raise DataError(
                f"the checkpoint is {self.skip} batches into an epoch, and the sampler now gives only "
                f"{left}; resume with the data of the saved run, or from a checkpoint written at the end of "
                "an epoch"
            )
        if not rng.equal(before, rng.capture(cuda=False)):
            warnings.warn(
                f"{self._name} draws from the process-wide generators all through an epoch, between "
                "the draws of the training itself: what is left of this epoch repeats only without workers, "
                "and if the sampler keeps nothing of what it drew; seed a generator of its own in __iter__ "
                "to resume exactly",
                stacklevel=6,
            )

    def _check_first(self, fingerprint: int | None) -> None:
        if self.first is not None and fingerprint is not None and self.first != fingerprint:
            raise DataError(
                f"{self._name} gives this epoch another order than it gave the saved run, from the "
                "same random state: its data changed, or it keeps a state of its own from epoch to epoch; "
                "give it a set_epoch method that fixes the order, or resume from a checkpoint written at the "
                "end of an epoch"
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
        self._stream = _IndexStream(self._index_sampler(), self._random, self._seed_generator())
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
        self._start, self._skip = self._random.capture(), skip
        self._stream = _IndexStream(self._index_sampler(), self._random, self._seed_generator(), skip)
        return self._iterate(None)

    def _randomness(self) -> Randomness:
        loader = self._loader
        return Randomness(
            generator=loader.generator,
            sampler=loader.sampler,
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
        if state["finished"] and not self._persistent:
            self._random.restore_own(state["own"])
            return iter(())
        try:
            return self._go_on(state)
        finally:
            rng.restore(before)

    def _go_on(self, state: State) -> Iterator[Any]:
        skip, initial = self._plan(state)
        self._start, self._skip = state["start"], skip
        draw = None if state["draw"] is None else apply(self._start, state["draw"])
        self._random.restore(self._start)
        self._stream = _IndexStream(
            self._index_sampler(),
            self._random,
            self._seed_generator(),
            skip,
            draw,
            state["first"],
            state["seed"],
        )
        if self._persistent:
            self._loader._iterator = None  # workers of an earlier run in this process have drawn already
        iterator = self._iterate(initial)
        if draw is not None:
            self._stream.begin()
        for _ in range(state["consumed"] - skip):
            if next(iterator, _END) is _END:
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
            "shape": self._shape(),
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
        check_shape(state["shape"], self._shape())

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


def _fingerprint(items: list[Any]) -> int | None:
    """A checksum of the epoch's first item; None for objects that print differently in every process."""
    text = repr(items)
    return None if " at 0x" in text else zlib.crc32(text.encode())
