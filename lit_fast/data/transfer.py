"""A batch's way to the device: a walk through its structure, and copies that overlap with computing.

On a GPU the copy runs on a stream of its own, from pinned memory, while the kernels of the step before are
still running. The host usually runs ahead of the GPU, so this overlaps even without fetching a batch early
(`PrefetchToDevice(..., ahead=0)`); `ahead=1` helps where the step waits for the GPU, at the price that the
next batch is read from the data before this one is trained on.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def move(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """The batch with every tensor in it on `device`; the same object where nothing had to move.

    Walks through mappings, lists, tuples, named tuples and dataclass instances, and calls `to(device)` of any
    other object that has it (a `PackedSequence`, a graph). Anything else is left as it is.

    Args:
        batch: What the loader gave; it is not changed.
        device: Where to.
        non_blocking: Let copies to a GPU overlap with the host. Only pinned memory is copied so, for pageable
            memory may be reused before it has been read.

    Example:
        >>> batch = {"x": torch.ones(2), "name": "a"}
        >>> move(batch, torch.device("cpu")) is batch
        True
    """
    # the commonest batches, where they should be already, cost a comparison for each tensor
    kind = type(batch)
    items = batch.values() if kind is dict else batch if kind is tuple or kind is list else (batch,)
    for item in items:
        if type(item) is not torch.Tensor or item.device != device:
            break
    else:
        return batch
    return walk(batch, lambda item: _to(item, device, non_blocking))


def walk(batch: Any, function: Callable[[Any], Any]) -> Any:
    """`batch` with `function` applied to every tensor and every other object that has a `to` method.

    A container is copied, as its own type, only if something in it changed.
    """
    kind = type(batch)
    if kind in _PLAIN:
        return batch
    if isinstance(batch, torch.Tensor) or callable(getattr(batch, "to", None)):
        return function(batch)
    if isinstance(batch, list | tuple):
        items = [walk(item, function) for item in batch]
        if all(map(_is, items, batch)):
            return batch
        if hasattr(batch, "_fields"):  # a named tuple takes its fields one by one
            return kind(*items)
        return items if kind is list else kind(items)
    if isinstance(batch, Mapping):
        changed = {key: walk(value, function) for key, value in batch.items()}
        if all(changed[key] is value for key, value in batch.items()):
            return batch
        return _mapping_like(batch, changed)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _walk_dataclass(batch, function)
    return batch


def _is(a: object, b: object) -> bool:
    return a is b


def _mapping_like(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return items
    if isinstance(batch, collections.defaultdict):
        return collections.defaultdict(batch.default_factory, items)
    return type(batch)(items)  # type: ignore[call-arg]


def _walk_dataclass(batch: Any, function: Callable[[Any], Any]) -> Any:
    changed = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        new = walk(value, function)
        if new is not value:
            changed[field.name] = new
    if not changed:
        return batch
    moved = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(moved, name, value)  # also where the dataclass is frozen, or makes no sense half moved
    return moved


def _to(item: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(item, torch.Tensor):
        # a tensor in ordinary memory is copied in the host's time: see move
        overlap = non_blocking and item.device.type == "cpu" and device.type != "cpu" and item.is_pinned()
        return item.to(device, non_blocking=overlap)
    return item.to(device)


class PrefetchToDevice:
    """Gives the batches of an iterator on `device`; to a GPU they are copied on a side stream, from pinned
    memory.

    Args:
        iterator: Where the batches come from.
        device: Where to. On anything but CUDA the batches are moved as they are asked for, and none is
            fetched early unless `ahead` says so.
        ahead: Batches to fetch and copy before they are asked for, 0 or more. Fetching early is visible where
            reading the data draws random numbers in this process: see `DataPosition.prefetch_safe`.

    An exception that the iterator raises comes out when its batch is asked for, after all batches before it.

    Example:
        >>> batches = PrefetchToDevice(iter([torch.ones(1), torch.zeros(1)]), torch.device("cpu"), ahead=1)
        >>> next(batches), batches.given, batches.fetched
        (tensor([1.]), 1, 2)
    """

    def __init__(self, iterator: Iterator[Any], device: torch.device, ahead: int = 1) -> None:
        if ahead < 0:
            raise ValueError(f"ahead={ahead}; give the number of batches to fetch early, 0 or more")
        self.given = 0  # batches that were asked for: what a position in the data has to count
        self.fetched = 0  # batches taken from the iterator
        self._next = iterator.__next__
        self._device = device
        self._ahead = ahead
        self._queue: collections.deque[tuple[Any, torch.cuda.Event | None]] = collections.deque()
        self._error: BaseException | None = None
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __iter__(self) -> PrefetchToDevice:
        return self

    def __next__(self) -> Any:
        queue = self._queue
        if not queue:
            self._fetch()
        if not queue:
            error, self._error = self._error, StopIteration()
            assert error is not None
            raise error
        batch, copied = queue.popleft()
        if copied is not None:
            batch = self._receive(batch, copied)
        # the fetch follows the wait: its copy is queued behind the last one and overlaps with the step to
        # come
        while len(queue) < self._ahead and self._error is None:
            self._fetch()
        self.given += 1
        return batch

    def _fetch(self) -> None:
        if self._error is not None:
            return
        try:
            batch = self._next()
        except Exception as error:  # not KeyboardInterrupt: that is for now, not for the next batch
            self._error = error
            return
        self.fetched += 1
        side = self._side
        if side is None:
            self._queue.append((move(batch, self._device), None))
            return
        batch = walk(batch, _pin)
        # The side stream need not wait for the current one: what it writes is fresh memory of its own pool.
        with torch.cuda.stream(side):
            batch = walk(batch, lambda item: _to(item, self._device, True) if _is_plain(item) else item)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(side)
        self._queue.append((batch, copied))

    def _receive(self, batch: Any, copied: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)  # the device waits, the host does not

        def receive(item: Any) -> Any:
            if not _is_plain(item):
                return item.to(self._device)
            # the side stream's pool must not give this memory out again before the current stream has read it
            item.record_stream(stream)
            return item

        return walk(batch, receive)


def _is_plain(item: Any) -> bool:
    """Whether an item can be pinned and recorded; sparse tensors and what moves itself go the slow way."""
    return type(item) is torch.Tensor and item.layout is torch.strided and not item.is_nested


def _pin(item: Any) -> Any:
    return item.pin_memory() if _is_plain(item) and item.device.type == "cpu" and item.numel() else item
