"""Several loaders as one: `CombinedLoader`, its modes, and what counts as a loader in a collection of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lit_fast.data.randomness import length_of

Limits = list[int | float] | None


class Walk:
    """One pass over several loaders: an iterator of (batch of each loader, batch_idx, dataloader_idx).

    Args:
        begin: how each loader's iterator is made.
        limits: batches of each loader; only `sequential` keeps to them by itself, the others by `length`.
    """

    def __init__(self, begin: list[Callable[[], Iterator[Any]]], limits: Limits = None) -> None:
        self.begin, self.limits = begin, limits
        self.iterators: list[Iterator[Any]] = []
        self.exhausted = [False] * len(begin)
        self.loader = 0  # which one gives the batches, in sequence
        self.batch_idx = 0  # of the next batch

    def start(self) -> None:
        self.iterators = [begin() for begin in self.begin]

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if not self.iterators:
            raise StopIteration
        batches = self.take()
        self.batch_idx += 1
        return batches, self.batch_idx - 1, 0

    def take(self) -> list[Any]:
        """The next batch of every loader."""
        raise NotImplementedError

    @staticmethod
    def length(lengths: list[int | float]) -> int | float:
        """Batches of a pass over loaders of these lengths, limits included; inf where unknown."""
        return max(lengths, default=0)


class MinSize(Walk):
    """Ends with the shortest loader."""

    def take(self) -> list[Any]:
        return [next(iterator) for iterator in self.iterators]

    @staticmethod
    def length(lengths: list[int | float]) -> int | float:
        return min(lengths, default=0)


class MaxSize(Walk):
    """Ends with the longest loader; one that has ended gives None."""

    def take(self) -> list[Any]:
        batches: list[Any] = [None] * len(self.iterators)
        for index, iterator in enumerate(self.iterators):
            try:
                batches[index] = next(iterator)
            except StopIteration:
                self.exhausted[index] = True
        if all(self.exhausted):
            raise StopIteration
        return batches


class MaxSizeCycle(Walk):
    """Ends with the longest loader; one that has ended begins anew."""

    def take(self) -> list[Any]:
        batches: list[Any] = []
        for index, iterator in enumerate(self.iterators):
            try:
                batches.append(next(iterator))
            except StopIteration:
                self.exhausted[index] = True
                if all(self.exhausted):
                    raise
                self.iterators[index] = self.begin[index]()
                batches.append(next(self.iterators[index]))
        return batches


class Sequential(Walk):
    """One loader after the other; a batch is one loader's."""

    def start(self) -> None:
        self.iterators = [self.begin[0]()] if self.begin else []

    def __next__(self) -> tuple[Any, int, int]:
        while self.loader < len(self.begin):
            if self.limits is None or self.batch_idx < self.limits[self.loader]:
                try:
                    batch = next(self.iterators[0])
                except StopIteration:
                    pass
                else:
                    self.batch_idx += 1
                    return batch, self.batch_idx - 1, self.loader
            self.exhausted[self.loader] = True
            self.loader, self.batch_idx = self.loader + 1, 0
            if self.loader < len(self.begin):
                self.iterators = [self.begin[self.loader]()]
        raise StopIteration

    @staticmethod
    def length(lengths: list[int | float]) -> int | float:
        return sum(lengths)


MODES: dict[str, type[Walk]] = {
    "min_size": MinSize,
    "max_size_cycle": MaxSizeCycle,
    "max_size": MaxSize,
    "sequential": Sequential,
}


class CombinedLoader(Iterable[Any]):
    """Loaders in a list, tuple, dict or nest of them, read as one.

    Iterating gives `(batch, batch_idx, dataloader_idx)`; except in the mode "sequential" a batch has the structure
    of `iterables`, with one batch of each loader in it.

    Args:
        iterables: A loader, or a collection of loaders. A list of tensors or numbers in it is a loader.
        mode: "min_size" ends with the shortest loader; "max_size_cycle" ends with the longest and begins the
            others anew as often as needed; "max_size" ends with the longest and gives None for the others;
            "sequential" reads one after the other.

    Raises:
        ValueError: An unknown mode; limits or loaders of another number than there are loaders.

    Example:
        >>> loaders = CombinedLoader({"a": range(3), "b": range(10, 12)}, mode="max_size_cycle")
        >>> [batch for batch, batch_idx, dataloader_idx in loaders]
        [{'a': 0, 'b': 10}, {'a': 1, 'b': 11}, {'a': 2, 'b': 10}]
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(f"CombinedLoader(mode={mode!r}): allowed are {', '.join(map(repr, MODES))}.")
        self._mode = mode
        self._flattened, self._structure = tree_flatten(iterables, is_leaf=is_list_of_batches)
        self._iterables = iterables
        self._limits: Limits = None
        self._walk: Walk | None = None

    @property
    def mode(self) -> str:
        return self._mode

    @property
    def iterables(self) -> Any:
        """The loaders, in the structure that they were given in."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The loaders in a list; set it to exchange them."""
        return self._flattened

    @flattened.setter
    def flattened(self, loaders: list[Any]) -> None:
        self._check_number("loaders", loaders)
        self._iterables = tree_unflatten(loaders, self._structure)
        self._flattened = loaders

    @property
    def limits(self) -> Limits:
        """How many batches of each loader count, or None; one number stands for every loader."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, int | float):
            limits = [limits] * len(self._flattened)
        if limits is not None:
            self._check_number("limits", limits)
        self._limits = limits

    def _check_number(self, what: str, given: list[Any]) -> None:
        if len(given) != len(self._flattened):
            raise ValueError(f"{len(given)} {what} were given for a CombinedLoader of {len(self._flattened)} loaders.")

    @property
    def sampler(self) -> Any:
        """The loaders' samplers, None where there is none, in the structure of `iterables`."""
        return self.restore([getattr(loader, "sampler", None) for loader in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The loaders' batch samplers, in the structure of `iterables`."""
        return self.restore([getattr(loader, "batch_sampler", None) for loader in self._flattened])

    def restore(self, items: list[Any]) -> Any:
        """One item for each loader, in the structure of `iterables`."""
        return tree_unflatten(items, self._structure)

    def walk(self, begin: list[Callable[[], Iterator[Any]]]) -> Walk:
        """A pass whose iterators `begin` makes; it has not started yet."""
        return MODES[self._mode](begin, self._limits)

    def __iter__(self) -> CombinedLoader:
        self._walk = self.walk([_beginning(loader) for loader in self._flattened])
        self._walk.start()
        return self

    def __next__(self) -> tuple[Any, int, int]:
        assert self._walk is not None, "iter(loader) comes first"
        batch, batch_idx, dataloader_idx = next(self._walk)
        if self._mode != "sequential":
            batch = self.restore(batch)
        return batch, batch_idx, dataloader_idx

    def __len__(self) -> int:
        """Batches of a pass.

        Raises:
            RuntimeError: `iter` was not called yet.
            TypeError: a loader without a length, and without a limit, decides it.
        """
        if self._walk is None:
            raise RuntimeError("len of a CombinedLoader is known after iter(loader); call that first.")
        length = self.length
        if length is None:
            raise TypeError("a CombinedLoader has no length where a loader that decides it has none")
        return length

    @property
    def length(self) -> int | None:
        """Batches of a pass, limits included; None where a loader without a length decides it."""
        lengths: list[int | float] = [
            math.inf if (known := length_of(loader)) is None else known for loader in self._flattened
        ]
        if self._limits is not None:
            lengths = [min(pair) for pair in zip(lengths, self._limits, strict=True)]
        length = MODES[self._mode].length(lengths)
        return None if length == math.inf else int(length)

    def end_pass(self) -> None:
        """Forget the pass that runs: its workers end, but for persistent ones."""
        self._walk = None

    def reset(self) -> None:
        """Stop every worker and forget the pass that runs."""
        self._walk = None
        for loader in self._flattened:
            shutdown = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
            if hasattr(loader, "_iterator"):
                loader._iterator = None


def _beginning(loader: Any) -> Callable[[], Iterator[Any]]:
    return lambda: iter(loader)


_NUMBERS = (torch.Tensor, int, float, complex, str, bytes, bool)


def is_list_of_batches(data: Any) -> bool:
    """Whether a list or tuple is a loader itself: its first item is a tensor or a number, or a tuple or dict of them.

    A list in a list is a loader in a collection.
    """
    if not isinstance(data, list | tuple) or not data:
        return False
    first = data[0]
    return isinstance(first, _NUMBERS) or (isinstance(first, tuple | Mapping) and _holds_numbers(first))


def _holds_numbers(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return bool(batch) and all(map(_holds_numbers, batch))
    return isinstance(batch, _NUMBERS)


def is_collection(data: Any) -> bool:
    """Whether training data is a collection of loaders: a list, tuple or dict that holds more than tensors."""
    return isinstance(data, list | tuple | Mapping) and bool(data) and not _holds_numbers(data)
