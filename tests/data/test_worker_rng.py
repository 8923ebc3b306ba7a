"""Following the random state of workers; what it is for is tested in test_position.py."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lit_fast.checkpoint import rng
from lit_fast.data.worker_rng import WorkerWatch, pack, unpack


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """This process plays the worker, and a worker's answers to signals are not its own."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_packed_state_is_the_whole_state() -> None:
    random.gauss(0, 1)  # leaves a second Gaussian pending, in Python as in numpy
    np.random.standard_normal()
    before, packed = rng.capture(cuda=False), pack()
    assert packed is not None and packed.dtype == torch.uint8
    random.random(), np.random.random(), torch.rand(1)
    assert not torch.equal(pack(), packed)
    unpack(packed)
    assert rng.equal(rng.capture(cuda=False), before)


def _watch(draws: dict[int, bool], initial: list[torch.Tensor | None] | None = None) -> WorkerWatch:
    """A watch that has followed one worker, played by this process, through len(draws) batches."""
    watch = WorkerWatch(None, lambda samples: torch.rand(1) if samples else 0, 1, prefetch=2, initial=initial)
    watch.init(0)
    for draw in draws.values():
        watch.collate(draw)
    return watch


def test_states_are_known_after_each_of_the_last_batches() -> None:
    start = pack()
    watch = _watch(dict.fromkeys(range(20), True))
    assert watch.drawn and not watch.hidden and watch.fetched().tolist() == [20]
    assert watch.states(torch.tensor([0])) == [None], "before the first draw it is the state that a worker starts in"
    assert watch.states(torch.tensor([5])) is None, "long ago"
    [state] = watch.states(torch.tensor([18]))
    unpack(start)
    for _ in range(18):
        torch.rand(1)
    assert torch.equal(pack(), state)


def test_until_a_worker_draws_its_state_is_the_first() -> None:
    watch = _watch({0: False, 1: False})
    assert not watch.drawn and watch.states(torch.tensor([2])) == [None]
    watch.collate(True)
    assert watch.drawn and watch.states(torch.tensor([2])) == [None]
    assert torch.equal(watch.states(torch.tensor([3]))[0], pack())


def test_a_worker_can_begin_in_a_given_state() -> None:
    start = pack()
    torch.rand(3)
    watch = _watch({0: False}, initial=[start])
    assert torch.equal(pack(), start) and watch.drawn
    assert torch.equal(watch.states(torch.tensor([0]))[0], start)
    assert torch.equal(watch.states(torch.tensor([1]))[0], start)


def test_a_worker_that_has_not_begun_yet_is_known_by_the_state_that_it_is_given() -> None:
    start = pack()
    watch = WorkerWatch(None, list, 2, prefetch=2, initial=[start, None])
    assert watch.drawn, "else a checkpoint of this moment would begin with other numbers"
    first, second = watch.states(torch.tensor([0, 0]))
    assert torch.equal(first, start) and second is None


@pytest.mark.parametrize("kind", ["owned from the start", "made at the first batch"])
def test_a_generator_that_the_data_owns_is_noticed(kind: str) -> None:
    class Collate:
        def __call__(self, samples: object) -> float:
            if not hasattr(self, "own"):
                self.own = random.Random(1)
            return self.own.random()

    collate = Collate()
    if kind == "owned from the start":
        collate.own = random.Random(1)
    watch = WorkerWatch(None, collate, 1, prefetch=2)
    watch.init(0)
    assert not watch.hidden
    watch.collate([])
    assert watch.hidden and not watch.drawn
