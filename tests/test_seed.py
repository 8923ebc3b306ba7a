"""Seeds: bounds, environment, every generator, workers."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lit_fast.errors import MisconfigurationException
from lit_fast.seed import (
    _seed_sequence,
    isolate_rng,
    pl_worker_init_function,
    reset_seed,
    seed_everything,
    seed_workers,
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.fixture(autouse=True)
def _no_seed_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


def test_the_same_seed_gives_the_same_numbers_everywhere() -> None:
    assert seed_everything(7, workers=True, verbose=False) == 7
    first = draw()
    assert os.environ["PL_GLOBAL_SEED"] == "7" and os.environ["PL_SEED_WORKERS"] == "1"
    seed_everything(8, verbose=False)
    assert draw() != first
    seed_everything(7, verbose=False)
    assert draw() == first
    assert os.environ["PL_SEED_WORKERS"] == "0"
    reset_seed()
    assert draw() == first


def test_the_seed_comes_from_the_environment_and_is_zero_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="seed is 0"):
        assert seed_everything() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert seed_everything(verbose=False) == 17
    assert seed_everything("3", verbose=False) == 3


@pytest.mark.parametrize("seed", [-1, 2**32, "many", None])
def test_a_seed_that_cannot_be_is_refused(seed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    with pytest.raises(MisconfigurationException, match=r"2\*\*32 - 1"):
        seed_everything(seed, verbose=False)  # type: ignore[arg-type]


def test_isolate_rng_puts_back_every_generator_even_after_an_error() -> None:
    seed_everything(1, verbose=False)
    expected = draw()
    seed_everything(1, verbose=False)
    with pytest.raises(KeyError), isolate_rng():
        draw()
        raise KeyError
    assert draw() == expected


def test_workers_differ_from_each_other_and_repeat() -> None:
    def of_worker(worker: int, rank: int) -> tuple[float, float, float]:
        torch.manual_seed(100 + worker)
        pl_worker_init_function(worker, rank)
        return draw()

    draws = {of_worker(worker, rank) for worker in range(3) for rank in range(2)}
    assert len(draws) == 6
    assert of_worker(2, 1) in draws


def test_worker_seeds_are_lightnings() -> None:
    # recorded with lightning 2.6.6: _generate_seed_sequence(1234, 3, 1, 4)
    assert _seed_sequence(1234, 3, 1, 4) == [
        4255015905013094337,
        9915599782507326446,
        14431657612503861975,
        4972903908943417548,
    ]


def test_workers_are_seeded_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(worker_id: int) -> None: ...

    def loader(**options: Any) -> DataLoader[int]:
        return DataLoader(range(4), **options)

    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    plain = loader(num_workers=1)
    seed_workers(plain, rank=0)
    assert plain.worker_init_fn is None

    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    loaders = {"a": loader(num_workers=1), "b": [loader(num_workers=1, worker_init_fn=own), loader()], "c": range(3)}
    seed_workers(loaders, rank=2)
    assert loaders["a"].worker_init_fn.keywords == {"rank": 2}
    assert loaders["a"].worker_init_fn.func is pl_worker_init_function
    assert [one.worker_init_fn for one in loaders["b"]] == [own, None]
