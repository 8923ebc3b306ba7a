"""The random state of each DataLoader worker, followed from inside the workers.

A worker's random state decides whether an epoch can be entered in the middle. `WorkerWatch` travels into the
workers as the loader's `worker_init_fn` and `collate_fn`, and keeps in shared memory, for the last few
batches that each worker fetched, the state of its generators after the batch. Until a worker has drawn for
the first time it only compares. All of its cost, about 0.2 ms a batch, is in the worker; the training process
pays nothing.
"""

from __future__ import annotations

import array
import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from lit_fast.checkpoint import rng
from lit_fast.data.randomness import find_generators
from lit_fast.data.worker_signals import leave_to_parent

_PYTHON = struct.Struct("<q625I?d")  # version, state words, whether a Gaussian is pending, that Gaussian
_NUMPY = struct.Struct("<?q?d")  # whether numpy is there, place in the words, Gaussian pending, that Gaussian
_NUMPY_WORDS = 624
_KEPT_BEYOND_PREFETCH = 8  # states kept per worker beyond those of prefetched batches: a consumer may lag so far


def pack() -> torch.Tensor | None:
    """This process's torch, Python and numpy states as one uint8 tensor; None for other numpy generators."""
    version, words, gauss = random.getstate()
    head = _PYTHON.pack(version, *words, gauss is not None, gauss or 0.0)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        tail = _NUMPY.pack(False, 0, False, 0.0) + bytes(4 * _NUMPY_WORDS)
    else:
        name, key, place, pending, cached = numpy.random.get_state(legacy=True)
        if name != "MT19937":
            return None
        tail = _NUMPY.pack(True, place, bool(pending), cached) + key.astype("<u4").tobytes()
    return torch.cat([torch.frombuffer(bytearray(head + tail), dtype=torch.uint8), torch.get_rng_state()])


def unpack(state: torch.Tensor) -> None:
    """Put this process's generators to a state that `pack` made."""
    data = bytes(state[: _PYTHON.size + _NUMPY.size + 4 * _NUMPY_WORDS].tolist())
    version, *words, pending, gauss = _PYTHON.unpack(data[: _PYTHON.size])
    random.setstate((version, tuple(words), gauss if pending else None))
    data = data[_PYTHON.size :]
    has_numpy, place, pending, gauss = _NUMPY.unpack(data[: _NUMPY.size])
    if has_numpy:
        import numpy

        key = array.array("I", data[_NUMPY.size :])
        numpy.random.set_state(("MT19937", numpy.array(key, dtype="uint32"), place, int(pending), gauss))
    torch.set_rng_state(state[_PYTHON.size + len(data) :].clone())


def _shared(shape: tuple[int, ...], dtype: torch.dtype, value: int) -> torch.Tensor:
    """A tensor that worker processes write and this one reads."""
    tensor = torch.full(shape, value, dtype=dtype)
    shared: torch.Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return shared


class WorkerWatch:
    """Follows the random state of a DataLoader's workers.

    Args:
        init_fn: The loader's own `worker_init_fn`, called first.
        collate_fn: The loader's own `collate_fn`.
        num_workers: Worker processes.
        prefetch: Batches that a worker fetches ahead.
        initial: One state for each worker, from `states`, which it takes on after `init_fn`; None keeps its
            own.
    """

    def __init__(
        self,
        init_fn: Callable[[int], None] | None,
        collate_fn: Callable[[Any], Any],
        num_workers: int,
        prefetch: int,
        initial: list[torch.Tensor | None] | None = None,
    ) -> None:
        self.init_fn, self.collate_fn = init_fn, collate_fn
        self.initial = initial
        self.slots = prefetch + _KEPT_BEYOND_PREFETCH
        width = _PYTHON.size + _NUMPY.size + 4 * _NUMPY_WORDS + torch.get_rng_state().numel()
        # Each row is written by one worker, and read here after a queue has handed over that worker's batch.
        self._fetched = _shared((num_workers,), torch.int64, 0)  # batches
        self._drawn_at = _shared((num_workers,), torch.int64, -1)  # batches before the first that drew; -1: none
        self._hidden = _shared((num_workers,), torch.int64, 0)
        self._labels = _shared((num_workers, self.slots), torch.int64, -1)
        self._states = _shared((num_workers, self.slots, width), torch.uint8, 0)
        self._last: torch.Tensor | None = None

    @classmethod
    def of(cls, loader: DataLoader[Any], initial: list[torch.Tensor | None] | None = None) -> WorkerWatch:
        """A watch for the workers that `iter(loader)` is about to start."""
        prefetch = loader.prefetch_factor or 0
        return cls(loader.worker_init_fn, loader.collate_fn, loader.num_workers, prefetch, initial)

    @contextmanager
    def installed(self, loader: DataLoader[Any]) -> Iterator[None]:
        """Hand the watch to the workers started inside; the loader's own functions are back afterwards."""
        init_fn, collate_fn = loader.worker_init_fn, loader.collate_fn
        loader.worker_init_fn, loader.collate_fn = self.init, self.collate
        try:
            yield
        finally:
            loader.worker_init_fn, loader.collate_fn = init_fn, collate_fn

    # In a worker

    def init(self, worker_id: int) -> None:
        """The loader's `worker_init_fn`."""
        leave_to_parent()
        if self.init_fn is not None:
            self.init_fn(worker_id)
        self._worker = worker_id
        initial = None if self.initial is None else self.initial[worker_id]
        if initial is not None:
            unpack(initial)
            self._drawn_at[worker_id] = 0
        self._last = pack()
        if self._last is None:
            self._hidden[worker_id] = 1
        info = get_worker_info()
        self._dataset = None if info is None else info.dataset
        self._own = find_generators(dataset=self._dataset, collate_fn=self.collate_fn)
        self._own_last = [rng.capture_generator(generator) for generator in self._own.values()]

    def collate(self, samples: Any) -> Any:
        """The loader's `collate_fn`: the last thing that a worker does for a batch."""
        batch = self.collate_fn(samples)
        self._after_fetch()
        return batch

    def _after_fetch(self) -> None:
        worker = self._worker
        count = int(self._fetched[worker]) + 1
        state = pack()
        if state is None:
            self._hidden[worker] = 1
        elif self._drawn_at[worker] >= 0:
            self._write(worker, count, state)
        elif self._last is None or not torch.equal(state, self._last):
            self._drawn_at[worker] = count - 1
            self._write(worker, count, state)
        if not self._hidden[worker]:
            now = [rng.capture_generator(generator) for generator in self._own.values()]
            # generators made on first use show up after the first batch; later ones are looked for ever more
            # rarely
            made = count & (count - 1) == 0 and self._found_more()
            if made or not rng.equal(now, self._own_last):
                self._hidden[worker] = 1
        self._fetched[worker] = count

    def _found_more(self) -> bool:
        return len(find_generators(dataset=self._dataset, collate_fn=self.collate_fn)) > len(self._own)

    def _write(self, worker: int, count: int, state: torch.Tensor) -> None:
        slot = count % self.slots
        self._states[worker, slot] = state
        self._labels[worker, slot] = count

    # In the training process

    def fetched(self) -> torch.Tensor:
        """Batches that each worker has fetched since it was started."""
        return self._fetched.clone()

    @property
    def drawn(self) -> bool:
        """Whether any worker has drawn from its process-wide generators, or goes on where one had."""
        goes_on = self.initial is not None and any(state is not None for state in self.initial)
        return goes_on or bool((self._drawn_at >= 0).any())

    @property
    def hidden(self) -> bool:
        """Whether a worker drew from a generator whose state is not followed: one that the dataset owns."""
        return bool(self._hidden.any())

    def states(self, fetched: torch.Tensor) -> list[torch.Tensor | None] | None:
        """Each worker's random state after its first `fetched[worker]` batches.

        None in the list is the state in which a worker starts; None for all means that one is no longer kept.
        """
        states: list[torch.Tensor | None] = []
        for worker, count in enumerate(fetched.tolist()):
            drawn_at = int(self._drawn_at[worker])
            if drawn_at < 0 or count <= drawn_at:  # a worker that has not begun yet, too: under load that takes seconds
                states.append(None if self.initial is None else self.initial[worker])
                continue
            slot = count % self.slots
            if int(self._labels[worker, slot]) != count:
                return None
            states.append(self._states[worker, slot].clone())
        return states
