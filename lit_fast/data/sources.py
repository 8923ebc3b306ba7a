"""How lists, loaders with a state of their own and plain iterables give their position; see `position.py`."""

from __future__ import annotations

import itertools
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from lit_fast.checkpoint import rng
from lit_fast.data.randomness import Randomness, State, apply, changes, check_shape, length_of, warn_of_replay
from lit_fast.data.worker_rng import WorkerWatch
from lit_fast.errors import DataError


class Source(Protocol):
    """One kind of data.

    `begin` returns a raw iterator over an epoch; `resume` one over what was left of it, and nothing at all
    where the state was taken at an epoch's end. `resume` leaves the process-wide generators as it finds them.
    `length`: the batches of the epoch that `state` is in, where they are not as many as `len` of the data says.

    A state may have the entry "processes": it is of another process, one of so many, and they are so many now.
    """

    @property
    def kind(self) -> str: ...
    @property
    def prefetch_safe(self) -> bool: ...
    def begin(self) -> Iterator[Any]: ...
    def resume(self, state: State) -> Iterator[Any]: ...
    def handed_out(self) -> int: ...
    def state(self, consumed: int, finished: bool) -> State: ...
    def check(self, state: State) -> None: ...
    def length(self, state: State) -> int | None: ...
    def explain(self) -> str: ...
    def close(self) -> None: ...


class SequenceSource:
    """A list or tuple of batches: the position is an index."""

    kind = "a list of batches"
    prefetch_safe = True

    def __init__(self, data: list[Any] | tuple[Any, ...]) -> None:
        self._data = data
        self._iterator: Any = iter(())

    def begin(self) -> Iterator[Any]:
        self._iterator = iter(self._data)
        return self._iterator  # type: ignore[no-any-return]

    def resume(self, state: State) -> Iterator[Any]:
        self._iterator = iter(self._data)
        self._iterator.__setstate__(state["consumed"])
        return self._iterator  # type: ignore[no-any-return]

    def handed_out(self) -> int:
        return len(self._data) - operator.length_hint(self._iterator)

    def state(self, consumed: int, finished: bool) -> State:
        return {"shape": {"batches": len(self._data)}}

    def check(self, state: State) -> None:
        check_shape(state["shape"], {"batches": len(self._data)})

    def length(self, state: State) -> int | None:
        return None

    def explain(self) -> str:
        return "the data is a list: a resumed run goes on at the index of its next batch"

    def close(self) -> None:
        """Nothing is open."""


class Counted:
    """Counts what an iterator gives, tells when its first item is asked for; runs no Python code per item."""

    def __init__(self, iterator: Iterator[Any], on_first: Callable[[], None] = lambda: None) -> None:
        self._ends: list[Callable[[], None]] = [on_first]  # emptied at the end
        # Nothing below refers back to this object: a loader's workers must stop when the last user lets go of the
        # iterator, not when a cycle is collected, in an order that breaks their queues. And nothing keeps an item, as
        # enumerate does: an empty dictionary's `get(number, item)` is `item`.
        self._numbers = iter(range(sys.maxsize))
        keep: Callable[[int, Any], Any] = dict[int, Any]().get
        numbered = map(keep, self._numbers, iterator)
        self.items: Iterator[Any] = itertools.chain.from_iterable(_parts(numbered, self._ends))

    @property
    def exhausted(self) -> bool:
        return not self._ends

    @property
    def count(self) -> int:
        taken = sys.maxsize - operator.length_hint(self._numbers)
        return taken - self.exhausted  # the number that was taken for the end


def _parts(iterator: Iterator[Any], ends: list[Callable[[], None]]) -> Iterator[Iterator[Any]]:
    ends[0]()
    yield iterator
    ends.clear()


class StatefulSource:
    """A loader that keeps its own position (`state_dict`, `load_state_dict`), torchdata's for one."""

    kind = "a loader with its own state_dict"
    prefetch_safe = False  # its state speaks of the batches that it gave, not of those that were consumed

    def __init__(self, data: Any) -> None:
        self._data = data
        self._offset = 0
        self._counted = Counted(iter(()))

    def begin(self) -> Iterator[Any]:
        self._offset = 0
        self._counted = Counted(iter(self._data))
        return self._counted.items

    def resume(self, state: State) -> Iterator[Any]:
        self._data.load_state_dict(state["loader"])
        if state["finished"] and state["exhausted"]:
            return iter(())
        before = rng.capture(cuda=False)
        iterator = self.begin()  # also where the epoch was broken off: the loader must see it ended by the next one
        self._offset = state["consumed"]
        rng.restore(before)
        return iterator

    def handed_out(self) -> int:
        return self._offset + self._counted.count

    def state(self, consumed: int, finished: bool) -> State:
        if consumed < self.handed_out() and not finished:
            raise DataError(
                f"{consumed} batches were consumed and {self.handed_out()} handed out, and a loader with its "
                "own state_dict knows only the latter; do not fetch ahead from it (see prefetch_safe)"
            )
        return {"loader": self._data.state_dict(), "exhausted": self._counted.exhausted}

    def check(self, state: State) -> None:
        """The rest, the loader's `load_state_dict` checks."""
        if "processes" in state:
            raise _not_for_others(type(self._data).__name__, *state["processes"])

    def length(self, state: State) -> int | None:
        return None

    def explain(self) -> str:
        return f"the {type(self._data).__name__} saves and restores its own position (state_dict)"

    def close(self) -> None:
        """The loader's workers are its own matter."""


class ReplaySource:
    """Any iterable, and DataLoaders over an IterableDataset: the batches before the position are fetched
    again.

    An `IterableDataset` that has `state_dict` and `load_state_dict` itself, read in this process, goes on by
    them.
    """

    prefetch_safe = False

    def __init__(self, data: Any) -> None:
        self._data = data
        self._loader: DataLoader[Any] | None = data if isinstance(data, DataLoader) else None
        loader = self._loader
        self.kind = "an iterable" if loader is None else "a DataLoader over an IterableDataset"
        self._workers = 0 if loader is None else loader.num_workers
        self._persistent = loader is not None and loader.persistent_workers
        dataset = None if loader is None or self._workers else loader.dataset
        has_state = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._dataset: Any = dataset if has_state else None
        self._watch: WorkerWatch | None = None
        self._random = Randomness()
        self._offset = 0
        self._start: State | None = None
        self._drawn: list[State] = []  # the state when the first batch was asked for
        self._raw: Any = None
        self._counted = Counted(iter(()))

    def begin(self) -> Iterator[Any]:
        self._random = Randomness(data=self._data)
        random = self._random
        drawn: list[State] = []
        self._start, self._drawn, self._offset = random.capture(), drawn, 0
        self._raw = self._iterator()
        self._counted = Counted(self._raw, lambda: drawn.append(random.capture()))
        return self._counted.items

    def _iterator(self) -> Iterator[Any]:
        loader = self._loader
        if loader is None or not self._workers or (self._persistent and loader._iterator is not None):
            return iter(self._data)
        self._watch = WorkerWatch.of(loader)
        with self._watch.installed(loader):
            return iter(loader)

    def resume(self, state: State) -> Iterator[Any]:
        before = rng.capture(cuda=False)
        random = self._random = Randomness(data=self._data)
        if self._persistent and state["drawn"]:
            warnings.warn(
                "persistent workers over an IterableDataset carry their random state from epoch to epoch, "
                "which is not saved: from the second epoch on, what they draw does not repeat; set "
                "persistent_workers=False to resume exactly",
                stacklevel=4,
            )
        if self._dataset is not None:
            self._dataset.load_state_dict(state["dataset"])
        if state["finished"]:
            random.restore_own(state["own"])
            return iter(())
        try:
            return self._replay(state, random)
        finally:
            rng.restore(before)

    def _replay(self, state: State, random: Randomness) -> Iterator[Any]:
        batches = 0 if self._dataset is not None else int(state["consumed"]) - int(state.get("offset", 0))
        if "processes" in state:
            batches = self._among_others(state, batches)
        warn_of_replay(batches, f"{self.kind} can only be read from its beginning")
        start = state["start"]
        first = None if state["first"] is None else apply(start, state["first"])
        random.restore(start)
        self.begin()
        self._start = start
        if first is not None and batches:
            self._drawn = [first]
            self._counted = Counted(self._raw, lambda: random.restore(first))
        fetched = sum(1 for _ in itertools.islice(self._counted.items, min(batches, 1)))
        after_first = rng.capture(cuda=False)
        fetched += sum(1 for _ in itertools.islice(self._counted.items, batches - fetched))
        if not rng.equal(after_first, rng.capture(cuda=False)):
            warnings.warn(
                f"{self.kind} draws from the process-wide generators between the steps, which draw from them "
                "too: batches to come repeat only if they do not depend on what was drawn for earlier ones "
                "(a shuffle buffer does); draw from a generator that the data owns, or in workers, to resume "
                "exactly",
                stacklevel=5,
            )
        if fetched < batches:
            raise DataError(
                f"the checkpoint is {batches} batches into an epoch, and the data ended after {fetched}; "
                "resume with the data of the saved run, and with an iterator that nothing has read from yet"
            )
        self._offset = state["consumed"] - batches
        if state["all_consumed"]:
            random.restore_own(state["own"])
        return self._counted.items

    def handed_out(self) -> int:
        return self._offset + self._counted.count

    def state(self, consumed: int, finished: bool) -> State:
        assert self._start is not None, "a position is asked for before an epoch was begun"
        return {
            "start": self._start,
            "first": changes(self._start, self._drawn[0]) if self._drawn else None,
            "own": self._random.capture_own(),
            "all_consumed": consumed == self.handed_out(),
            "offset": self._offset,
            "dataset": None if self._dataset is None else self._dataset.state_dict(),
            "drawn": self._watch is not None and (self._watch.drawn or self._watch.hidden),
            "shape": self._shape(),
        }

    def _shape(self) -> State:
        loader = self._loader
        if loader is None:
            return {"batches": length_of(self._data)}
        return {"batch_size": loader.batch_size, "drop_last": loader.drop_last, "num_workers": self._workers}

    def check(self, state: State) -> None:
        if "processes" not in state:
            check_shape(state["shape"], self._shape())
        elif self._dataset is not None:
            raise _not_for_others(type(self._dataset).__name__, *state["processes"])

    def length(self, state: State) -> int | None:
        known = length_of(self._data)
        if known is None or state["finished"]:
            return None
        offset = int(state.get("offset", 0))
        if "processes" in state:
            consumed = int(state["consumed"])
            offset = consumed - self._batches_among_others(state, consumed - offset)[0]
        return known + offset if offset else None

    def _batches_among_others(self, state: State, batches: int) -> tuple[int, int]:
        """What each process fetches again to have seen as much as others saw in `batches`; samples left over."""
        then, now = state["processes"]
        size = int(state["shape"].get("batch_size") or 1)
        own = 1 if self._loader is None else int(self._loader.batch_size or 1)
        return divmod(batches * size * then, own * now)[0], batches * size * then % (own * now)

    def _among_others(self, state: State, batches: int) -> int:
        then, now = state["processes"]
        batches, over = self._batches_among_others(state, batches)
        warnings.warn(
            f"{then} processes read from {self.kind}, and {now} go on: each leaves out {batches} batches of its own, "
            f"as many samples together{f' but for {over}, which come twice' if over else ''}. That they are the same "
            f"samples is so only where the data deals them out in turn among the processes; where it does not, resume "
            f"with {then} processes, or from a checkpoint written at the end of an epoch",
            stacklevel=7,
        )
        return batches

    def explain(self) -> str:
        if self._dataset is not None:
            return f"the {type(self._dataset).__name__} saves and restores its own position (state_dict)"
        return f"the data is {self.kind}: a resumed run fetches every batch before its position again (replay)"

    def close(self) -> None:
        if self._workers:
            stop_workers(self._raw)
            if self._loader is not None:
                self._loader._iterator = None


def _not_for_others(name: str, then: int, now: int) -> DataError:
    return DataError(
        f"the checkpoint is in the middle of an epoch that {then} processes read, and there are {now} now: a {name} "
        f"saves its own position, and it cannot be told what the others have seen. Resume with {then} processes, or "
        f"from a checkpoint that was written at the end of an epoch"
    )


def stop_workers(iterator: Any) -> None:
    """Stop a DataLoader iterator's worker processes now."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()
