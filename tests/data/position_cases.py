"""Data of every kind that a run may be resumed in, and the training loop that is resumed: see test_position.py.

A ledger row holds the epoch, the batch, and one draw from every process-wide generator, which stands for what
training itself draws (dropout, augmentation). One uninterrupted run saves at many places; saving must not
disturb it.
"""

from __future__ import annotations

import itertools
import pathlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lit_fast.checkpoint import io, rng
from lit_fast.data.position import DataPosition

Row = tuple[Any, ...]
EPOCHS = 3


def plain_of(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(
    make: Callable[[], Any],
    path: pathlib.Path,
    save_at: tuple[tuple[int, int], ...] = (),
    resume: pathlib.Path | None = None,
    ahead: int = 0,
    limit: int | None = None,
    end_epochs: bool = True,
) -> list[Row]:
    """A training loop. Saves after `save_at` = (epoch, batches) into `path`; fetches `ahead` early."""
    seed_all(0 if resume is None else 999)
    position = DataPosition(make())
    start, ledger = 0, []
    if resume is not None:
        checkpoint = io.load(resume)
        position.load_state_dict(checkpoint["position"])
        rng.restore(checkpoint["rng"])
        start = checkpoint["epoch"]
    for epoch in range(start, EPOCHS):
        position.set_epoch(epoch)
        consumed = position.handed_out if epoch == start else 0
        batches = iter(position)
        queue = [*itertools.islice(batches, ahead)]
        while limit is None or consumed < limit:
            queue.extend(itertools.islice(batches, 1))
            if not queue:
                break
            batch = queue.pop(0)
            consumed += 1
            ledger.append((epoch, consumed, plain_of(batch), torch.rand(1).item(), random.random(), np.random.random()))
            if (epoch, consumed) in save_at:
                save(position, path, epoch, consumed, consumed)
        if end_epochs:
            position.end_epoch()
        if (epoch, -1) in save_at:
            save(position, path, epoch + 1, -1, None)
    return ledger


def save(position: DataPosition, path: pathlib.Path, epoch: int, name: int, consumed: int | None) -> None:
    payload = {"position": position.state_dict(consumed), "rng": rng.capture(), "epoch": epoch}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a class that weights_only=True refuses would warn
        io.save(payload, path / f"{epoch - (name == -1)}-{name}.ckpt")


def assert_resumed_is_the_tail(
    make: Callable[[], Any],
    path: pathlib.Path,
    save_at: tuple[tuple[int, int], ...],
    quiet: bool = True,
    repeat: bool = True,
    **options: Any,
) -> None:
    whole = train(make, path, save_at, **options)
    if repeat:
        assert whole == train(make, path, **options), "saving disturbs the run, or it does not repeat at all"
    for epoch, consumed in save_at:
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
            resumed = train(make, path, resume=path / f"{epoch}-{consumed}.ckpt", **options)
        if consumed == -1:
            expected = [row for row in whole if row[0] > epoch]
        else:
            expected = [row for row in whole if row[:2] > (epoch, consumed)]
        assert expected and resumed == expected, f"resumed from epoch {epoch} after {consumed} batches"


class Numbers(Dataset[Any]):
    """Sample i is i, with random numbers beside it from the kinds of generators in `draws`."""

    def __init__(self, size: int = 23, draws: str = "") -> None:
        self.size, self.draws = size, draws
        self.own = np.random.default_rng(5) if "o" in draws else None
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        assert 0 <= index < self.size
        self.reads += 1
        row = [float(index)]
        row += [torch.rand(1).item()] if "t" in self.draws else []
        row += [np.random.standard_normal()] if "n" in self.draws else []
        row += [random.gauss(0, 1)] if "p" in self.draws else []
        row += [self.own.random()] if self.own is not None else []
        info = get_worker_info()
        row += [info.id, float(info.seed % 1000)] if info is not None and "w" in self.draws else []
        if self.draws.startswith("late") and index == 3:  # draws for one sample only
            row = [torch.rand(1).item()]
        return torch.tensor((row + [0.0] * 6)[:6], dtype=torch.float64)


class EagerSampler(Sampler[int]):
    """Draws its order in `__iter__`, before the loader draws its workers' seed."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(23).tolist())

    def __len__(self) -> int:
        return 23


class PythonSampler(Sampler[int]):
    """Draws its order with Python's and numpy's generators, at the first index."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(23))
        random.shuffle(order)
        np.random.shuffle(order)
        yield from order

    def __len__(self) -> int:
        return 23


class OwnBatchSampler(Sampler[list[int]]):
    """A batch sampler with a generator of its own, which goes on drawing all through the epoch."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(6):
            yield self.generator.integers(0, 23, size=int(self.generator.integers(1, 5))).tolist()

    def __len__(self) -> int:
        return 6


class Stream(IterableDataset[Any]):
    """Numbers of this worker's share, with torch's noise, and a shuffle buffer that draws while it runs."""

    def __init__(self, buffer: Any = random) -> None:
        self.random = buffer

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        buffer: list[int] = []
        for number in range(worker, 23, workers):
            buffer.append(number)
            if len(buffer) == 4:
                yield torch.tensor([float(buffer.pop(self.random.randrange(4))), torch.rand(1).item()])
        for number in buffer:
            yield torch.tensor([float(number), 0.0])


class Resumable(IterableDataset[Any]):
    def __init__(self) -> None:
        self.next, self.reads = 0, 0

    def __iter__(self) -> Iterator[int]:
        while self.next < 23:
            self.next, self.reads = self.next + 1, self.reads + 1
            yield self.next - 1
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Batches:
    """A user's own iterable: not a DataLoader."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(6)
        for number in order:
            yield number + torch.rand(1)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def loader_of(draws: str = "", **options: Any) -> DataLoader[Any]:
    if "batch_sampler" not in options:
        options.setdefault("batch_size", 4)
    return DataLoader(Numbers(draws=draws), **options)


IN_PROCESS: dict[str, Callable[[], Any]] = {
    "sequential": loader_of,
    "shuffled": lambda: loader_of(shuffle=True),
    "shuffled with a generator": lambda: loader_of(shuffle=True, generator=own_generator()),
    "drop_last": lambda: loader_of(shuffle=True, drop_last=True),
    "batch_size None": lambda: loader_of(shuffle=True, batch_size=None),
    "with replacement": lambda: loader_of(sampler=RandomSampler(Numbers(), replacement=True, num_samples=90)),
    "with replacement and a generator": lambda: loader_of(
        sampler=RandomSampler(Numbers(), replacement=True, num_samples=90, generator=own_generator())
    ),
    "weighted": lambda: loader_of(sampler=WeightedRandomSampler([i % 5 + 0.5 for i in range(23)], 23)),
    "subset with a generator": lambda: loader_of(sampler=SubsetRandomSampler(range(19), generator=own_generator())),
    "distributed": lambda: loader_of(
        sampler=DistributedSampler(Numbers(), num_replicas=2, rank=1, seed=4), batch_size=2
    ),
    "eager sampler": lambda: loader_of(sampler=EagerSampler()),
    "python sampler": lambda: loader_of(sampler=PythonSampler()),
    "own batch sampler": lambda: loader_of(batch_sampler=OwnBatchSampler()),
    "batch sampler": lambda: loader_of(batch_sampler=BatchSampler(PythonSampler(), 3, drop_last=True)),
    "list as sampler": lambda: loader_of(sampler=list(range(22, 0, -1))),
    "random transforms": lambda: loader_of("tnp", shuffle=True),
    "own generator in the dataset": lambda: loader_of("to", shuffle=True, generator=own_generator()),
    "list": lambda: [torch.tensor([i]) for i in range(7)],
    "tuple": lambda: tuple(range(7)),
    "dataset with a state": lambda: DataLoader(Resumable(), batch_size=4),
}

REPLAYED: dict[str, Callable[[], Any]] = {
    "iterable dataset": lambda: DataLoader(Stream(random.Random(8)), batch_size=4),
    "iterable": Batches,
    "iterable dataset, workers": lambda: DataLoader(Stream(), batch_size=3, num_workers=2),
    "own generator in workers": lambda: loader_of("to", shuffle=True, num_workers=2),
}

IN_WORKERS: dict[str, Callable[[], Any]] = {
    "deterministic": lambda: loader_of("w", shuffle=True, num_workers=2),
    "batch_size None": lambda: loader_of("w", shuffle=True, batch_size=None, num_workers=2),
    "random": lambda: loader_of("tnpw", shuffle=True, num_workers=2),
    "random, late": lambda: loader_of("late", shuffle=True, num_workers=3),
    "random, generator": lambda: loader_of(
        "tnpw", shuffle=True, num_workers=3, generator=own_generator(), prefetch_factor=1
    ),
    "persistent": lambda: loader_of("w", shuffle=True, num_workers=2, persistent_workers=True),
    "persistent, random": lambda: loader_of(
        "tnpw", shuffle=True, num_workers=2, persistent_workers=True, generator=own_generator()
    ),
    "persistent, eager sampler": lambda: loader_of(
        "tw", sampler=EagerSampler(), num_workers=2, persistent_workers=True
    ),
    "with replacement and a generator": lambda: loader_of(
        "w",
        sampler=RandomSampler(Numbers(), replacement=True, num_samples=90, generator=own_generator()),
        num_workers=2,
    ),
}

PLACES = ((0, 1), (1, 2), (1, 5))
