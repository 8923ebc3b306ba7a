"""What was given as data, made into what a loop reads: collections combined, shuffling off, and warnings."""

from __future__ import annotations

import copy
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lit_fast.data.randomness import length_of
from lit_fast.errors import DataTypeError, MisconfigurationException, PossibleUserWarning


def check_iterable(loader: Any, what: str) -> None:
    """Raises: DataTypeError, where a loader is nothing that can be iterated."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise DataTypeError(
            f"The {what} data is {type(loader).__name__}, which cannot be iterated; pass a DataLoader, any iterable of "
            f"batches, or a list of them."
        )


def is_shuffled(loader: Any) -> bool:
    """Whether torch's own random sampler orders the data of a map-style loader."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return False
    batch_sampler = getattr(loader, "batch_sampler", None)
    own = getattr(loader, "sampler", None) if batch_sampler is None else getattr(batch_sampler, "sampler", None)
    return isinstance(own, RandomSampler)


def with_batch_sampler(loader: DataLoader[Any], batch_sampler: Any, **others: Any) -> DataLoader[Any]:
    """A copy of a loader that reads its indices elsewhere; the given one stays as it is."""
    loader = copy.copy(loader)
    # DataLoader forbids setting these after __init__; no pass over the copy has begun yet.
    loader.__dict__.update(batch_sampler=batch_sampler, _iterator=None, **others)
    return loader


def with_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """A copy of a loader that draws its indices from another sampler, through a batch sampler such as it has."""
    batch_sampler: Any = loader.batch_sampler
    if type(batch_sampler) is BatchSampler:
        batch_sampler = BatchSampler(sampler, batch_sampler.batch_size, batch_sampler.drop_last)
    elif batch_sampler is not None:
        batch_sampler = copy.copy(batch_sampler)
        batch_sampler.sampler = sampler
    return with_batch_sampler(loader, batch_sampler, sampler=sampler)


def in_order(loader: Any) -> Any:
    """A copy of a loader that reads its data set from front to back; other than map-style DataLoaders stay as they are.

    Raises:
        MisconfigurationException: its batch sampler has no `sampler` to replace.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is not None and not hasattr(batch_sampler, "sampler"):
        raise MisconfigurationException(
            f"overfit_batches needs data in a fixed order, and {type(batch_sampler).__name__} has no attribute "
            f"`sampler` that could be replaced by one in order; give it one, or pass a loader in order."
        )
    return with_sampler(loader, SequentialSampler(loader.dataset))  # type: ignore[arg-type]


def all_in_order(loaders: list[Any], name: str) -> list[Any]:
    """The loaders without shuffling, for `overfit_batches`; says so where one shuffled."""
    if all(isinstance(loader.sampler, SequentialSampler) for loader in loaders if hasattr(loader, "sampler")):
        return loaders
    warnings.warn(
        f"overfit_batches: the {name} is read in order instead of shuffled, so that every epoch has the same batches. "
        f"Pass it with shuffle=False to say so yourself.",
        stacklevel=4,
    )
    return [in_order(loader) for loader in loaders]


def warn_of(loader: Any, name: str, trains: bool, reloaded: bool) -> None:
    """Whatever about a loader is allowed and often a mistake, as Lightning says it, in the same circumstances."""
    for message in _doubts(loader, name, trains, reloaded):
        warnings.warn(message, category=PossibleUserWarning, stacklevel=5)
    length = length_of(loader)
    if length == 0:
        warnings.warn(
            f"The {name} is empty: len({type(loader).__name__}) is 0, so nothing is done with it. (drop_last=True "
            f"leaves no batch of a data set smaller than batch_size.)",
            stacklevel=5,
        )
    if length is not None and isinstance(getattr(loader, "dataset", None), IterableDataset):
        warnings.warn(
            f"The data set of the {name} is an IterableDataset with a length. With several workers it gives that many "
            f"samples only if each worker reads its own share.",
            stacklevel=5,
        )


def _doubts(loader: Any, name: str, trains: bool, reloaded: bool) -> Iterator[str]:
    if not isinstance(loader, DataLoader):
        return
    if not trains and is_shuffled(loader):
        yield f"The {name} is shuffled, so that its order differs from run to run; pass shuffle=False to its loader."
    context = loader.multiprocessing_context
    start_method = (multiprocessing if context is None else context).get_start_method()
    spare = usable_processors() - 1
    if loader.num_workers > 0 and start_method == "spawn" and not loader.persistent_workers:
        yield (
            f"The {name} starts its workers by spawning, anew in each epoch; DataLoader(persistent_workers=True) "
            f"keeps them."
        )
    elif loader.num_workers < 2 and spare > 1:
        yield (
            f"The {name} has {loader.num_workers} workers, so loading may be what training waits for; "
            f"DataLoader(num_workers={spare}) would use this machine's processors."
        )
    if loader.persistent_workers and loader.pin_memory and reloaded:
        yield (
            f"The {name} has persistent workers and pinned memory, and is loaded anew by "
            f"reload_dataloaders_every_n_epochs, which PyTorch does not do stably; set pin_memory=False."
        )


def usable_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
