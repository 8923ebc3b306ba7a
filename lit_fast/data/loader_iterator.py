"""What a step that takes `dataloader_iter` is given: it fetches its batches itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any


class EndOfData(Exception):
    """A step asked for a batch where none is left."""


class LoaderIterator:
    """Gives `(batch, batch_idx, dataloader_idx)`, untouched: the step moves the batch to its device itself.

    Args:
        batches: where they come from.
        fetched: batches of this pass that were given before (in a run that is resumed).
        length: of the whole pass; None where unknown.
        dataloader_idx: which loader gives them.
        on_fetch: told each batch.
        on_done: called as soon as no batch is left.

    Attributes:
        batch, batch_idx: the last ones, for hooks, which run around the step.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        length: int | None,
        fetched: int = 0,
        dataloader_idx: int = 0,
        on_fetch: Callable[[Any], None] = lambda batch: None,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch: Any = None
        self.batch_idx, self.dataloader_idx = 0, dataloader_idx
        self.fetched, self.length, self.done = fetched, length, length is not None and fetched >= length
        self._batches, self._on_fetch, self._on_done = batches, on_fetch, on_done

    def __iter__(self) -> LoaderIterator:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self.done:
            raise StopIteration
        try:
            self.batch = next(self._batches)
        except StopIteration:
            self.done = True
            raise
        self.batch_idx = self.fetched
        self.fetched += 1
        self._on_fetch(self.batch)
        if self.length is not None and self.fetched >= self.length:
            self.done = True
            self._on_done()
        return self.batch, self.batch_idx, self.dataloader_idx

    def turns(self) -> Iterator[LoaderIterator]:
        """Itself, once for each step, until there is nothing left."""
        while not self.done:
            yield self


def takes_iterator(step: Callable[..., Any]) -> bool:
    """Whether a step has an argument `dataloader_iter`."""
    try:
        return "dataloader_iter" in signature(step).parameters
    except (TypeError, ValueError):
        return False


def step_of(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that takes an iterator, to be called like any other; the end of the data is an exception of its own."""

    def call(iterator: LoaderIterator, *where: int) -> Any:
        try:
            return step(iterator)
        except StopIteration as end:
            raise EndOfData from end

    return call


def hook_of(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that is given the last batch and its index, in place of the iterator and the number of the step."""

    def call(*arguments: Any) -> Any:
        at = next(index for index, argument in enumerate(arguments) if type(argument) is LoaderIterator)
        iterator: LoaderIterator = arguments[at]
        return hook(*arguments[:at], iterator.batch, iterator.batch_idx, *arguments[at + 2 :])

    return call
