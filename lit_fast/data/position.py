"""Exact position in the data: save in the middle of an epoch, go on with the very batches that were still to
come.

What an epoch's order depends on is drawn when it begins: a `DataLoader` draws the seed of its workers, a
`RandomSampler` its own. So the state of the generators at those moments is remembered. To go on, it is put
back, the order is drawn again, and the index stream (numbers, not data) is advanced past the batches that
were consumed.

How each kind of data goes on:

- A list or tuple of batches: at its index.
- Several loaders (`CombinedLoader`): each as below; those that began anew inside the epoch, in their own pass.
- A loader, or a dataset read in this process, with `state_dict` and `load_state_dict`: by its own state.
- A DataLoader over a map-style dataset: the indices are skipped, and no sample is read. Where other processes began
  the epoch, or batches of another size, the indices that are left are dealt out anew (`order.py`).
- The same with workers: also each worker's random state is restored; fewer than `num_workers` batches are
  read again, so that every worker goes on with the tasks that it would have had.
- A dataset that draws, in workers, from a generator of its own; an IterableDataset; any other iterable: by
  replay, which fetches every batch before the position again and says so.

One iteration costs nothing here: `iter(position)` hands out the loader's own iterator.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_fast.data.combined import CombinedLoader
from lit_fast.data.combined_source import CombinedSource
from lit_fast.data.loader_source import LoaderSource
from lit_fast.data.sources import ReplaySource, SequenceSource, Source, StatefulSource
from lit_fast.errors import DataError

_VERSION = 2
_KNOWN = (1, 2)  # 1: without the place in the order that all processes share


class DataPosition:
    """One source of training batches, and the place in it.

    Args:
        dataloader: A `torch.utils.data.DataLoader`, a list or tuple of batches, a `CombinedLoader`, an object with
            `state_dict` and `load_state_dict`, or any other iterable.

    The order on resume is: `load_state_dict`, then `lit_fast.checkpoint.rng.restore`, then `iter`. An `iter`
    that goes on inside an epoch leaves the process-wide generators as it finds them.

    Example:
        >>> import torch
        >>> def loader():
        ...     return torch.utils.data.DataLoader(range(10), batch_size=2, shuffle=True)
        >>> _ = torch.manual_seed(0)
        >>> position = DataPosition(loader())
        >>> batches = iter(position)
        >>> seen = [next(batches), next(batches)]
        >>> state = position.state_dict()
        >>> expected = [batch.tolist() for batch in batches]
        >>> resumed = DataPosition(loader())
        >>> resumed.load_state_dict(state)
        >>> [batch.tolist() for batch in resumed] == expected
        True
    """

    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader
        self._source = _source_of(dataloader)
        self._epoch: int | None = None
        self._begun = False
        self._finished = False
        self._resume: dict[str, Any] | None = None
        self._skip = 0  # batches at the beginning of the next epoch that are not wanted

    def __getstate__(self) -> dict[str, Any]:
        return {"dataloader": self.dataloader}  # a copy, of a Trainer for instance, begins anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["dataloader"])  # type: ignore[misc]

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or go on inside the one that was loaded.

        Returns the raw iterator: `next` on it runs no code of ours.

        Raises:
            DataError: The data does not give the batches that it gave before; the message says what differs.
        """
        state, self._resume = self._resume, None
        self._begun, self._finished = True, False
        if state is None:
            skip, self._skip = self._skip, 0
            return _begin_behind(self._source, skip) if skip else self._source.begin()
        iterator = self._source.resume(state)
        if state["finished"]:
            return self._source.begin()
        return iterator

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, its sampler and its batch sampler's, where they have a `set_epoch`, which epoch begins."""
        self._epoch = epoch
        tell_epoch(self.dataloader, epoch)

    def draw(self) -> None:
        """Draw what the making of one iterator draws, without one: the seeds of workers, with workers of the order."""
        if self._resume is not None:
            return
        loaders = self.dataloader.flattened if isinstance(self.dataloader, CombinedLoader) else [self.dataloader]
        for loader in loaders:
            if isinstance(loader, DataLoader):
                torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
                if loader.num_workers:
                    next(iter(loader._index_sampler), None)

    def end_epoch(self) -> None:
        """Say that the consumer wants no more of this epoch, whether or not batches are left in it.

        A `state_dict` taken from then on makes the next run begin a new epoch.
        """
        self._finished = self._begun

    def close(self) -> None:
        """Stop the loader's worker processes. `state_dict` still works; the next `iter` starts new workers.

        Left to the garbage collector, an iterator that is part of a cycle may lose the pipes to its workers before
        the threads that write to them have ended, and they complain.
        """
        self._source.close()

    @property
    def handed_out(self) -> int:
        """Batches of this epoch that the iterator has given so far, those of earlier runs included.

        After `load_state_dict` and before `iter`: the index of the batch that will come first.
        """
        if not self._begun:
            if self._resume is None:
                return self._skip
            return 0 if self._resume["finished"] else int(self._resume["consumed"])
        return self._source.handed_out()

    @property
    def epoch_length(self) -> int | None:
        """After `load_state_dict` and before `iter`: how many batches the epoch has in all, those before it included.

        None where as many as the data's own length says. Other than that are an epoch's that other processes, or other
        batches, began: each process had so many of its batches, and what is left of the epoch is dealt out anew.
        """
        return None if self._resume is None else self.length_of(self._resume)

    def length_of(self, state: dict[str, Any]) -> int | None:
        """`epoch_length` for a state that is not loaded."""
        return self._source.length(state) if state["begun"] and not state["finished"] else None

    @property
    def prefetch_safe(self) -> bool:
        """Whether a consumer may fetch one batch early without changing any random number that anyone draws.

        True where fetching runs no code of the user's in this process: lists, and DataLoaders with workers
        whose samplers are torch's own.
        """
        return self._source.prefetch_safe

    def explain(self) -> str:
        """One sentence: how a run that is resumed goes on, and what that costs or cannot do."""
        return self._source.explain()

    def state_dict(self, consumed: int | None = None, finished: bool | None = None) -> dict[str, Any]:
        """The position, a few tens of kilobytes, loadable with `weights_only=True`.

        Args:
            consumed: Batches of this epoch that the consumer is done with, those of earlier runs included. It
                is less than `handed_out` where the consumer has fetched ahead; the batches between come again
                on resume. None: all that were handed out.
            finished: Whether the next run is to begin a new epoch, not to go on inside this one. None: what
                `end_epoch` said.

        Raises:
            DataError: `consumed` is more than was handed out, or lags further behind than is kept track of.
        """
        if not self._begun:
            # nothing has been drawn since the state was loaded, or since the beginning: it is still the
            # position
            return self._resume if self._resume is not None else count_only(self._skip)
        handed_out = self._source.handed_out()
        consumed = handed_out if consumed is None else consumed
        if not 0 <= consumed <= handed_out:
            raise DataError(
                f"consumed={consumed} batches of an epoch that has handed out {handed_out}; give the number "
                "of batches of this epoch that training is done with"
            )
        finished = self._finished if finished is None else finished
        return {
            "version": _VERSION,
            "begun": True,
            "world_size": _world_size(),
            "kind": self._source.kind,
            "epoch": self._epoch,
            "consumed": consumed,
            "finished": finished,
            **self._source.state(consumed, finished),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next `iter` go on where `state` was taken.

        Raises:
            DataError: The data differs from that of the saved run (its kind, its length, batch size or
            sampler).
        """
        if state.get("version") not in _KNOWN:
            raise DataError(
                f"a position in the data of version {state.get('version')!r}, while {_VERSION} is the newest known "
                "here; resume with the version of lit_fast that wrote the checkpoint"
            )
        self._begun = self._finished = False
        self._resume = None
        if not state["begun"]:
            self._skip = state["skip"]
            if state["loaders"] and isinstance(self._source, StatefulSource):
                self.dataloader.load_state_dict(state["loaders"][0])
                self._skip = 0
            return
        if state["kind"] != self._source.kind:
            raise DataError(
                f"the checkpoint was written while training on {state['kind']}, and the data given now is "
                f"{self._source.kind}; resume with the same kind of data"
            )
        if not state["finished"]:
            self._source.check(state)
        if state["epoch"] is not None:
            self.set_epoch(state["epoch"])
        self._resume = state


def count_only(skip: int, loaders: list[Any] | None = None) -> dict[str, Any]:
    """A position that says how many batches of an epoch were seen, and not which: all that Lightning's files hold.

    Args:
        skip: The next epoch begins behind so many of its batches. Where the order is the same in every epoch they are
            those that were seen; a loader that shuffles draws a new order, of which as many are left out.
        loaders: What `state_dict` of the loaders that have one returned; goes before `skip`.
    """
    return {"version": _VERSION, "begun": False, "skip": skip, "loaders": loaders or []}


def _world_size() -> int:
    """Processes that train together."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _begin_behind(source: Source, skip: int) -> Iterator[Any]:
    if isinstance(source, LoaderSource):
        return source.begin(skip)
    iterator = source.begin()
    collections.deque(itertools.islice(iterator, skip), maxlen=0)
    return iterator


def _source_of(data: Any) -> Source:
    if isinstance(data, CombinedLoader):
        return CombinedSource(data, [DataPosition(loader) for loader in data.flattened])
    if callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None)):
        return StatefulSource(data)
    if isinstance(data, DataLoader) and LoaderSource.fits(data):
        return LoaderSource(data)
    if type(data) in (list, tuple):
        return SequenceSource(data)
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise DataError(
            f"a {type(data).__name__} cannot be iterated over; give a DataLoader, a list of batches or an iterable"
        )
    return ReplaySource(data)


def tell_epoch(loader: Any, epoch: int) -> None:
    """Call every `set_epoch` of a loader, or of each combined one, and of its samplers, each object's once."""
    if isinstance(loader, CombinedLoader):
        for each in loader.flattened:
            tell_epoch(each, epoch)
        return
    batch_sampler = getattr(loader, "batch_sampler", None)  # Lightning leaves its own set_epoch to the program
    targets = [loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)]
    if isinstance(batch_sampler, DistributedSampler):  # ours, which deals out the batches of the program's
        targets.append(batch_sampler)
    for target in {id(target): target for target in targets}.values():
        call = getattr(target, "set_epoch", None)
        if callable(call):
            call(epoch)
