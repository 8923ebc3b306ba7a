"""How the samples of a data set are shared out among processes: distributed samplers, put into the loaders.

A DataLoader whose sampler is torch's own gets a `torch.utils.data.DistributedSampler`: the order of an epoch is a pure
function of seed and epoch, the same in every process, and process r of W reads every W-th sample from r on. What has an
order of its own (samplers and batch samplers of a program) is drawn whole in every process, from the same random state,
and dealt out in the same way.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lit_fast.checkpoint import rng
from lit_fast.data.loaders import is_shuffled, with_batch_sampler, with_sampler
from lit_fast.data.randomness import length_of
from lit_fast.errors import DataTypeError, PossibleUserWarning


class UnrepeatedDistributedSampler(DistributedSampler[Any]):
    """A `DistributedSampler` that repeats no sample, so that processes may get one more or one less than others.

    For prediction, where every sample is wanted once. Arguments are those of `torch.utils.data.DistributedSampler`.

    Example:
        >>> [list(UnrepeatedDistributedSampler(range(5), 2, rank, shuffle=False)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total_size = len(self.dataset)  # type: ignore[arg-type]
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))


class _Wraps(DistributedSampler[Any]):
    """Deals out what another sampler gives, in the order in which it gives it."""

    def __init__(self, sampler: Any, *args: Any, **kwargs: Any) -> None:
        if length_of(sampler) is None:
            raise DataTypeError(
                f"The sampler of a DataLoader, {type(sampler).__name__}, has no length, so it cannot be shared out "
                f"among processes. Give it a __len__, or set Trainer(use_distributed_sampler=False) and let it give "
                f"each process its own share."
            )
        self.sampler = sampler
        super().__init__(sampler, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        order = draw_alike(self.sampler, self.seed + self.epoch)
        if self.drop_last:
            del order[len(order) // self.num_replicas * self.num_replicas :]
        elif order and not isinstance(self, UnrepeatedDistributedSampler):
            order += [order[index % len(order)] for index in range(-len(order) % self.num_replicas)]
        return iter(order[self.rank :: self.num_replicas])

    def set_epoch(self, epoch: int) -> None:
        """Tell the wrapped sampler too; where it is a batch sampler, also the sampler that it reads."""
        super().set_epoch(epoch)
        for each in (self.sampler, getattr(self.sampler, "sampler", None)):
            call = getattr(each, "set_epoch", None)
            if callable(call):
                call(epoch)


class DistributedSamplerWrapper(_Wraps):
    """Shares out what any sampler with a length gives: process r of W takes every W-th item, from the r-th on.

    The order is the wrapped sampler's own. What it draws from the process-wide generators is drawn from a state that
    `seed` and `set_epoch` give, so that it is the same in every process; those generators are left as they were.

    Args:
        sampler: any iterable with a length; it gives indices, or, as a batch sampler, lists of them.
        args, kwargs: of `torch.utils.data.DistributedSampler`; `shuffle` has no effect.

    Raises:
        DataTypeError: the sampler has no length.

    Example:
        >>> [list(DistributedSamplerWrapper([7, 3, 9], num_replicas=2, rank=rank)) for rank in range(2)]
        [[7, 9], [3, 7]]
    """


class UnrepeatedDistributedSamplerWrapper(_Wraps, UnrepeatedDistributedSampler):
    """A `DistributedSamplerWrapper` that repeats no sample.

    Example:
        >>> [list(UnrepeatedDistributedSamplerWrapper([7, 3, 9], num_replicas=2, rank=rank)) for rank in range(2)]
        [[7, 9], [3]]
    """


def draw_alike(sampler: Any, seed: int) -> list[Any]:
    """Everything that a sampler gives in an epoch, drawn from process-wide generators that begin at `seed`."""
    before = rng.capture(cuda=False)
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        return list(sampler)
    finally:
        rng.restore(before)


def distribute(
    loaders: Sequence[Any],
    stage: str,
    name: str,
    share: Mapping[str, Any] | None,
    overfit: bool = False,
    once: bool = False,
) -> list[Any]:
    """The loaders as one of several processes reads them: each DataLoader gives its share of the samples.

    What is left as it is: data that is no DataLoader over a map-style data set, and a loader that has a
    DistributedSampler already. The given loaders are not changed; copies with another sampler are returned.

    Args:
        stage: "train", "validate", "test" or "predict". Training data is shuffled, other data where its loader shuffles
            it, and for prediction no sample is repeated.
        name: what to call the data in warnings.
        share: `num_replicas` and `rank`, maybe `seed` (else that of `seed_everything`, else 0), as
            `strategy.distributed_sampler_kwargs` gives them. None: there is nothing to share out.
        overfit: whether `overfit_batches` is on, which keeps the order.
        once: whether each sample should count exactly once, as in `Trainer.validate`: a repeated one is warned of.

    Raises:
        DataTypeError: a sampler has no length.

    Example:
        >>> loader = DataLoader(range(8), batch_size=2)
        >>> [shared] = distribute([loader], "validate", "validation data", {"num_replicas": 2, "rank": 1})
        >>> [batch.tolist() for batch in shared]
        [[1, 3], [5, 7]]
    """
    if share is None:
        return list(loaders)
    share = {"seed": int(os.environ.get("PL_GLOBAL_SEED", "0")), **share}
    return [_shared(loader, stage, name, share, overfit, once) for loader in loaders]


def _shared(loader: Any, stage: str, name: str, share: dict[str, Any], overfit: bool, once: bool) -> Any:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    batch_sampler: Any = loader.batch_sampler
    source = loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)
    if any(isinstance(each, DistributedSampler) for each in (source, batch_sampler, loader.sampler)):
        return loader
    if batch_sampler is not None and type(batch_sampler).__iter__ is not BatchSampler.__iter__:
        # It groups indices in its own way, which may depend on all of them: its batches are dealt out whole.
        kind = UnrepeatedDistributedSamplerWrapper if stage == "predict" else DistributedSamplerWrapper
        sampler: Any = kind(batch_sampler, **share)
        shared = with_batch_sampler(loader, sampler)
    elif stage == "predict":
        sampler = UnrepeatedDistributedSamplerWrapper(source, **share)
        shared = with_sampler(loader, sampler)
    elif _takes_all(source, loader.dataset):
        shuffle = (stage == "train" or is_shuffled(loader)) and not overfit
        if shuffle and isinstance(source, SequentialSampler):
            _say_shuffled(name, share["num_replicas"])
        sampler = DistributedSampler(loader.dataset, shuffle=shuffle, **share)
        shared = with_sampler(loader, sampler)
    else:
        sampler = DistributedSamplerWrapper(source, **share)
        shared = with_sampler(loader, sampler)
    if once and stage != "predict":
        _say_repeated(name, sampler)
    return shared


def _takes_all(sampler: Any, dataset: Any) -> bool:
    """Whether it gives each sample of the data set once, in order or in any order, so that another one can do so."""
    if not isinstance(sampler, (RandomSampler, SequentialSampler)) or len(sampler) != len(dataset):
        return False
    return not (isinstance(sampler, RandomSampler) and sampler.replacement)


def _say_shuffled(name: str, processes: int) -> None:
    warnings.warn(
        f"The {name} is read in order by its loader, and shuffled now that {processes} processes share it, as in "
        f"Lightning. To keep the order, give the loader a DistributedSampler(shuffle=False).",
        category=PossibleUserWarning,
        stacklevel=5,
    )


def _say_repeated(name: str, sampler: DistributedSampler[Any]) -> None:
    repeated = -len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
    if repeated:
        warnings.warn(
            f"The {name} has {len(sampler.dataset)} samples for {sampler.num_replicas} processes: "  # type: ignore[arg-type]
            f"{repeated} of them count twice, so that every process has as many. Evaluate with Trainer(devices=1, "
            f"num_nodes=1) for figures in which each sample counts once.",
            category=PossibleUserWarning,
            stacklevel=5,
        )
