"""Samples shared out among processes: the order is torch's DistributedSampler's, and no loader loses its own ways."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from heart_models import Plain, rows, shuffled, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_fast.checkpoint import rng
from lit_fast.data.combined import CombinedLoader
from lit_fast.data.position import tell_epoch
from lit_fast.data.samplers import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
    distribute,
)
from lit_fast.errors import DataTypeError, PossibleUserWarning

pytestmark = pytest.mark.filterwarnings("ignore:The data is read in order by its loader")


def share(loader: Any, rank: int, world: int, stage: str = "train", **options: Any) -> Any:
    (shared,) = distribute([loader], stage, "data", {"num_replicas": world, "rank": rank}, **options)
    return shared


def lists(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stage", ["train", "validate", "test"])
def test_order_is_that_of_a_hand_written_ddp_program(
    stage: str, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = range(23)
    for world, epoch in itertools.product((1, 2, 4), (0, 3)):
        for rank in range(world):
            loader = share(DataLoader(data, batch_size=3, shuffle=shuffle, drop_last=True), rank, world, stage)
            tell_epoch(loader, epoch)
            sampler = DistributedSampler(data, world, rank, shuffle=shuffle or stage == "train", seed=7)
            sampler.set_epoch(epoch)
            assert lists(loader) == lists(DataLoader(data, batch_size=3, sampler=sampler, drop_last=True))
            assert type(loader.sampler) is DistributedSampler and loader.batch_sampler.sampler is loader.sampler


def test_orders_recorded_from_lightning() -> None:
    """Lightning 2.6.6, `_process_dataloader` with num_replicas=2, rank=1, and no seed set."""
    data = list(range(11))
    first = [[0, 3, 8], [1, 7, 10]]
    assert lists(share(DataLoader(data, batch_size=3), 1, 2)) == first
    assert lists(share(DataLoader(data, batch_size=3, shuffle=True), 1, 2)) == first
    assert lists(share(DataLoader(data, batch_size=3), 1, 2, "validate")) == [[1, 3, 5], [7, 9, 0]]
    assert lists(share(DataLoader(data, batch_size=3, shuffle=True), 1, 2, "validate")) == first
    assert lists(share(DataLoader(data, batch_size=3), 1, 2, "predict")) == [[1, 3, 5], [7, 9]]
    assert lists(share(DataLoader(data, sampler=data[:10], batch_size=3), 1, 2, "validate")) == [[1, 3, 5], [7, 9]]
    assert [int(i) for i in share(DataLoader(data, batch_size=None), 1, 2)] == [0, 3, 8, 1, 7, 10]


class Greedy(Sampler[int]):
    """Draws with each kind of generator, and remembers which epoch it was told."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        order = [(i + self.epoch) % 12 for i in torch.randperm(12).tolist()]
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 12

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Buckets(BatchSampler):
    """Groups neighbours, and gives the groups in an order of its own."""

    def __iter__(self) -> Iterator[list[int]]:
        groups = list(super().__iter__())
        return iter([groups[i] for i in torch.randperm(len(groups)).tolist()])


def test_a_sampler_of_the_program_keeps_its_order_and_gives_each_sample_once() -> None:
    for sampler in (Greedy(), SubsetRandomSampler(range(3, 15)), list(range(11, -1, -1))):
        seen = []
        for rank in range(3):
            torch.manual_seed(rank)  # processes that draw for themselves, too
            loader = share(DataLoader(range(16), sampler=sampler, batch_size=2), rank, 3)
            seen.append([i for batch in lists(loader) for i in batch])
            before = rng.capture()
            assert list(loader.sampler) == seen[-1] and rng.equal(before, rng.capture())
        assert sorted(itertools.chain.from_iterable(seen)) == sorted(sampler) and isinstance(
            loader.sampler, DistributedSamplerWrapper
        )
    assert seen == [[11, 8, 5, 2], [10, 7, 4, 1], [9, 6, 3, 0]]


def test_orders_of_wrapped_samplers_change_with_seed_and_epoch() -> None:
    def order(epoch: int, **seed: int) -> list[int]:
        wrapper = DistributedSamplerWrapper(WeightedRandomSampler([1.0] * 40, 40), num_replicas=2, rank=0, **seed)
        wrapper.set_epoch(epoch)
        return list(wrapper)

    assert order(0) == order(0) and len({tuple(order(*each)) for each in ((0,), (1,))}) == 2
    assert order(1) == order(0, seed=1) != order(0)


def test_batch_samplers_of_the_program_are_dealt_out_in_whole_batches() -> None:
    batches = Buckets(SequentialSampler(range(24)), 4, False)
    shares = [lists(share(DataLoader(range(24), batch_sampler=batches), rank, 2)) for rank in range(2)]
    assert (
        sorted(itertools.chain.from_iterable(shares)) == [list(range(i, i + 4)) for i in range(0, 24, 4)]
        and len(shares[0]) == 3
    )
    plain = [lists(share(DataLoader(range(6), batch_sampler=[[0, 1], [2], [3, 4, 5]]), rank, 2)) for rank in range(2)]
    assert plain == [[[0, 1], [3, 4, 5]], [[2], [0, 1]]], "padded by its first batch"


def test_torchs_batch_sampler_keeps_its_batch_size_and_its_sampler() -> None:
    inner = SubsetRandomSampler([0, 4, 8, 12])
    loader = share(DataLoader(range(16), batch_sampler=BatchSampler(inner, 2, True)), 0, 2)
    assert isinstance(loader.sampler, DistributedSamplerWrapper) and loader.sampler.sampler is inner
    assert loader.batch_sampler.batch_size == 2 and loader.batch_sampler.drop_last


def test_torchs_random_sampler_keeps_what_was_asked_of_it() -> None:
    """Draws with replacement, and so many of them."""
    sampler = RandomSampler(range(4), replacement=True, num_samples=20)
    shares = [list(share(DataLoader(range(8), sampler=sampler), rank, 2).sampler) for rank in range(2)]
    assert [len(each) for each in shares] == [10, 10] and set(itertools.chain(*shares)) == set(range(4))


def test_set_epoch_reaches_what_is_wrapped() -> None:
    inner = Greedy()
    for loader in (
        DataLoader(range(16), sampler=inner),
        DataLoader(range(16), batch_sampler=BatchSampler(inner, 2, False)),
        DataLoader(range(16), batch_sampler=Buckets(inner, 2, False)),
        DataLoader(range(16), sampler=inner, batch_size=None),
    ):
        shared = share(loader, 0, 2)
        for epoch, told in ((3, shared), (4, CombinedLoader([shared, [1]], "max_size"))):
            tell_epoch(told, epoch)
            assert inner.epoch == epoch


def test_what_is_left_alone() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    own = DistributedSampler(range(8), 2, 1)
    for loader in (
        DataLoader(Stream()),
        DataLoader(range(8), sampler=own),
        DataLoader(range(8), batch_sampler=BatchSampler(own, 2, False)),
        DataLoader(range(8), batch_sampler=Buckets(own, 2, False)),
        [torch.zeros(1)],
        iter(()),
    ):
        assert share(loader, 0, 2) is loader
    once = share(DataLoader(range(8)), 0, 2)
    assert share(once, 0, 2) is once
    plain = DataLoader(range(8))
    assert distribute([plain], "train", "data", None) == [plain]


def test_a_loader_with_its_own_init_keeps_everything_else() -> None:
    class Loader(DataLoader[int]):
        def __init__(self, size: int) -> None:
            super().__init__(range(size), batch_size=2, shuffle=True, collate_fn=tuple, num_workers=0)
            self.note = object()

    given_ = Loader(8)
    shared = share(given_, 1, 2)
    assert type(shared) is Loader and shared.note is given_.note and shared.collate_fn is tuple
    assert len(shared) == 2 and len(given_) == 4 and not isinstance(given_.sampler, DistributedSampler)


def test_overfit_batches_keeps_the_order() -> None:
    assert lists(share(DataLoader(range(8), shuffle=True), 1, 2, overfit=True)) == [[1], [3], [5], [7]]


def test_a_sampler_without_a_length_is_refused() -> None:
    endless = itertools.cycle([1])
    with pytest.raises(DataTypeError, match="cycle, has no length"):
        share(DataLoader(range(3), sampler=endless), 0, 2)
    with pytest.raises(TypeError):
        UnrepeatedDistributedSamplerWrapper(endless, num_replicas=2, rank=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.booleans())
def test_prediction_takes_every_sample_once(samples: int, world: int, shuffle: bool) -> None:
    data = range(samples)
    loaders = [DataLoader(data, batch_size=2, shuffle=shuffle and samples > 0) for _ in range(world)]
    shares = [lists(share(loader, rank, world, "predict")) for rank, loader in enumerate(loaders)]
    assert sorted(i for each in shares for batch in each for i in batch) == list(data)
    plain = [list(UnrepeatedDistributedSampler(data, world, rank)) for rank in range(world)]
    assert sorted(itertools.chain.from_iterable(plain)) == list(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_processes_have_as_many_samples_as_each_other(samples: int, world: int, drop_last: bool) -> None:
    wrapped = [
        DistributedSamplerWrapper(range(samples), num_replicas=world, rank=rank, drop_last=drop_last)
        for rank in range(world)
    ]
    torchs = [DistributedSampler(range(samples), world, rank, False, 0, drop_last) for rank in range(world)]
    assert [list(each) for each in wrapped] == [list(each) for each in torchs]
    assert [len(each) for each in wrapped] == [len(each) for each in torchs]


def test_what_is_said() -> None:
    with pytest.warns(PossibleUserWarning, match="The rows is read in order by its loader, and shuffled now that 2"):
        distribute([DataLoader(range(3))], "train", "rows", {"num_replicas": 2, "rank": 0})
    with pytest.warns(PossibleUserWarning, match="3 samples for 2 processes: 1 of them count twice"):
        share(DataLoader(range(3)), 0, 2, "test", once=True)


def test_loaders_of_a_trainer_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Evaluates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch[0]

    made = trainer(max_epochs=1)
    monkeypatch.setattr(type(made), "distributed_sampler_kwargs", property(lambda self: {"num_replicas": 2, "rank": 1}))
    made.fit(Evaluates(), shuffled(16), CombinedLoader([DataLoader(rows(6)), DataLoader(rows(4))], "max_size"))
    assert made.train_dataloader.sampler.rank == 1 and made.num_training_batches == 2 and made.num_val_batches == [3, 2]
    with pytest.warns(PossibleUserWarning, match="The validation data has 5 samples for 2 processes"):
        made.validate(Evaluates(), DataLoader(rows(5)), verbose=False)
    predicted = made.predict(Evaluates(), DataLoader(rows(5), batch_size=2, drop_last=True))
    assert torch.equal(torch.cat(predicted), rows(5)[[1, 3]][0])
    alone = trainer(max_epochs=1, use_distributed_sampler=False)
    alone.fit(Evaluates(), shuffled(16))
    assert not isinstance(alone.train_dataloader.sampler, DistributedSampler)
