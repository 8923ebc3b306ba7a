"""An order of samples, drawn again from its recipe and dealt out among processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from position_cases import OwnBatchSampler, PythonSampler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler

from lit_fast.data.order import Share, check, draw, recipe_of
from lit_fast.data.randomness import Randomness
from lit_fast.data.samplers import distribute
from lit_fast.errors import DataError

sizes = st.integers(1, 5)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 60), sizes, st.none() | sizes, st.booleans(), st.booleans())
def test_dealing(units: int, replicas: int, size: int | None, drop_last: bool, even: bool) -> None:
    drop_last = drop_last and size is not None
    shares = [Share(replicas, rank, size, drop_last, even) for rank in range(replicas)]
    dealt = [share.deal(list(range(units))) for share in shares]
    flat = [[i for batch in each for i in batch] if size else each for each in dealt]
    assert {len(each) for each in dealt} == {shares[0].batches(units)}, "as many batches in each process"
    assert all(
        each[: len(range(rank, units, replicas))] == [*range(rank, units, replicas)][: len(each)]
        for rank, each in enumerate(flat)
    )
    seen = sorted(i for each in flat for i in each)
    whole = units - units % shares[0].step if drop_last else units - units % replicas if even else units
    assert sorted(set(seen)) == list(range(whole)), "none missing but for those that were to be left out"
    assert len(seen) - whole == shares[0].repeated(units) < replicas
    if shares[0].repeated(units):
        assert (
            min(len(each) for each in flat) == max(len(each) for each in flat)
            and (size or 1) * (shares[0].batches(units) - 1) == len(flat[0]) - 1
        ), "only where a process would have no last batch"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), sizes, sizes, st.booleans(), st.integers(0, 3))
def test_dealing_the_whole_order_is_torchs_sampler_without_its_padding(
    units: int, replicas: int, size: int, shuffle: bool, epoch: int
) -> None:
    for rank in range(replicas):
        sampler = DistributedSampler(range(units), replicas, rank, shuffle, seed=3)
        sampler.set_epoch(epoch)
        loader = DataLoader(range(units), sampler=sampler, batch_size=size)
        share, recipe = Share.of(loader), recipe_of(loader, Randomness())
        order = draw(recipe, loader, Randomness(), None)
        assert sorted(order) == list(range(units)) and len(share.deal(order)) == len(loader)
        mine = [i for batch in share.deal(order) for i in batch]
        assert mine == list(sampler)[: len(mine)] and len(sampler) - len(mine) <= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"shuffle": True},
        lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(4)},
        lambda: {"sampler": RandomSampler(range(9), replacement=True, num_samples=30)},
        lambda: {"sampler": RandomSampler(range(9), num_samples=30)},
        lambda: {"sampler": SubsetRandomSampler(range(7), generator=torch.Generator().manual_seed(4))},
        lambda: {"sampler": PythonSampler()},
        lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler(range(9)), 2, True)},
        lambda: {"batch_sampler": OwnBatchSampler()},
        lambda: {},
    ],
)
def test_an_order_is_drawn_again(make: Any) -> None:
    """From the state of the generators before, also in a loader that is shared out now."""
    loader = DataLoader(range(23), **make())

    def random_of(loader: DataLoader[Any]) -> Randomness:
        from lit_fast.data.order import source_of, unwrapped

        return Randomness(generator=loader.generator, sampler=unwrapped(source_of(loader)))

    recipe, generators = recipe_of(loader, random_of(loader)), random_of(loader).capture()
    source = loader.batch_sampler if recipe["unit"] == "batches" else loader.batch_sampler.sampler
    expected = list(source)
    shared = distribute([DataLoader(range(23), **make())], "train", "data", {"num_replicas": 2, "rank": 1})[0]
    for again in (loader, shared):
        check(recipe, again)
        torch.manual_seed(77)
        assert draw(recipe, again, random_of(again), generators) == expected
    assert len(expected) == recipe["units"]


def test_what_cannot_be_dealt_out_anew() -> None:
    class Own(DistributedSampler[int]):
        """Shares out in a way of its own."""

    def recipe(**options: Any) -> Any:
        return recipe_of(DataLoader(range(9), **options), Randomness())

    plain = DataLoader(range(9))
    for then, now, message in (
        (recipe(sampler=Own(range(9), 2, 0)), plain, "Own shares its samples out in a way of its own"),
        (recipe(batch_sampler=[[1]]), plain, "gave batches, and now gives samples"),
        (recipe(sampler=PythonSampler()), plain, "was PythonSampler and is SequentialSampler"),
        (recipe(), DataLoader(range(9), sampler=PythonSampler()), "was SequentialSampler and is PythonSampler"),
        (recipe(), DataLoader(range(8)), "length was 9 and is 8"),
        (recipe(sampler=iter(())), DataLoader(range(8), sampler=iter(())), "has no length"),
    ):
        with pytest.raises(DataError, match=message):
            check(then, now)
