"""The numbers of the batches that a loader will fetch, as `loader_source.py` follows them: what was drawn when, and
what is left out on a resume.
"""

from __future__ import annotations

import collections
import itertools
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler

from lit_fast.checkpoint import rng
from lit_fast.data.order import Rest
from lit_fast.data.randomness import Randomness, State
from lit_fast.data.worker_rng import WorkerWatch
from lit_fast.errors import DataError

END = object()


class IndexStream:
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
        self._name = source.name if type(source) is Rest else type(inner).__name__
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
        item = next(self._items, END)
        self._head = [] if item is END else [item]
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


def _fingerprint(items: list[Any]) -> int | None:
    """A checksum of the epoch's first item; None for objects that print differently in every process."""
    text = repr(items)
    return None if " at 0x" in text else zlib.crc32(text.encode())
