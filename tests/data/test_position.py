"""Position in the data: the ledger of a resumed run is the tail of the uninterrupted one's, sample for sample."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import pathlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from position_cases import (
    IN_PROCESS,
    IN_WORKERS,
    PLACES,
    REPLAYED,
    Numbers,
    Stream,
    assert_resumed_is_the_tail,
    loader_of,
    own_generator,
    plain_of,
    seed_all,
    train,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
)

from lit_fast.checkpoint import io, rng
from lit_fast.data.position import DataPosition
from lit_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.mark.parametrize("case", IN_PROCESS)
def test_in_this_process(case: str, tmp_path: pathlib.Path) -> None:
    assert_resumed_is_the_tail(IN_PROCESS[case], tmp_path, (*PLACES, (1, -1)))


@pytest.mark.parametrize("case", REPLAYED)
def test_replay_says_so(case: str, tmp_path: pathlib.Path) -> None:
    assert_resumed_is_the_tail(REPLAYED[case], tmp_path, PLACES, quiet=False)
    position = DataPosition(REPLAYED[case]())
    position.load_state_dict(io.load(tmp_path / "1-5.ckpt")["position"])
    with pytest.warns(UserWarning, match="fetching 5 batches again"):
        batches = iter(position)
    next(batches)
    assert "replay" in position.explain()


@pytest.mark.dist
@pytest.mark.parametrize("case", IN_WORKERS)
def test_in_workers(case: str, tmp_path: pathlib.Path) -> None:
    torch.set_num_threads(1)
    repeat = case in ("deterministic", "persistent, random")
    assert_resumed_is_the_tail(IN_WORKERS[case], tmp_path, ((1, 3), (1, -1)), repeat=repeat)


@pytest.mark.dist
@pytest.mark.parametrize("case", ["random, generator", "persistent, random", "with replacement and a generator"])
def test_batches_fetched_ahead_are_not_lost(case: str, tmp_path: pathlib.Path) -> None:
    assert DataPosition(IN_WORKERS[case]()).prefetch_safe
    assert_resumed_is_the_tail(IN_WORKERS[case], tmp_path, ((1, 4),), repeat=False, ahead=1)


@pytest.mark.parametrize("case", ["list", "shuffled", "shuffled with a generator"])
def test_batches_fetched_ahead_in_this_process(case: str, tmp_path: pathlib.Path) -> None:
    assert DataPosition(IN_PROCESS[case]()).prefetch_safe is (case == "list")
    assert_resumed_is_the_tail(IN_PROCESS[case], tmp_path, PLACES, ahead=1)


@pytest.mark.dist
@pytest.mark.parametrize("case", ["persistent, random", "random"])
def test_epochs_that_are_broken_off(case: str, tmp_path: pathlib.Path) -> None:
    """As by `limit_train_batches`: persistent workers go on with what they were given, and draw."""
    assert_resumed_is_the_tail(IN_WORKERS[case], tmp_path, ((0, 2), (1, 3), (1, -1)), repeat=False, limit=3)


@pytest.mark.parametrize("case", ["shuffled with a generator", "list", "dataset with a state", "own batch sampler"])
def test_epochs_that_are_broken_off_in_this_process(case: str, tmp_path: pathlib.Path) -> None:
    assert_resumed_is_the_tail(IN_PROCESS[case], tmp_path, ((0, 2), (1, 3), (0, -1), (1, -1)), limit=3)


@pytest.mark.slow
@pytest.mark.dist
def test_spawned_workers(tmp_path: pathlib.Path) -> None:
    def make() -> DataLoader[Any]:
        return loader_of("tnp", shuffle=True, num_workers=1, multiprocessing_context="spawn", persistent_workers=True)

    assert_resumed_is_the_tail(make, tmp_path, ((1, 3),))


def _resumed(data: Any, state: dict[str, Any]) -> tuple[DataPosition, Iterator[Any]]:
    position = DataPosition(data)
    position.load_state_dict(state)
    return position, iter(position)


def _state_after(data: Any, batches: int) -> dict[str, Any]:
    position = DataPosition(data)
    for _ in itertools.islice(iter(position), batches):
        pass
    return position.state_dict()


def test_skipping_reads_no_sample() -> None:
    state = _state_after(loader_of(shuffle=True), 3)
    loader = loader_of(shuffle=True)
    position, batches = _resumed(loader, state)
    assert loader.dataset.reads == 0 and position.handed_out == 3
    next(batches)
    assert loader.dataset.reads == 4 and position.handed_out == 4


def test_a_resuming_iter_leaves_the_generators_alone() -> None:
    state = _state_after(loader_of("tnp", shuffle=True), 3)
    before = rng.capture()
    _, batches = _resumed(loader_of("tnp", shuffle=True), state)
    assert rng.equal(rng.capture(), before)
    next(batches)
    assert not rng.equal(rng.capture(), before)


def test_resumed_runs_can_be_saved_and_resumed_again(tmp_path: pathlib.Path) -> None:
    for make in (
        IN_PROCESS["shuffled with a generator"],
        IN_PROCESS["random transforms"],
        IN_PROCESS["list"],
    ):
        whole = train(make, tmp_path, ((1, 2),))
        once = train(make, tmp_path, ((1, 4),), resume=tmp_path / "1-2.ckpt")
        twice = train(make, tmp_path, resume=tmp_path / "1-4.ckpt")
        assert once == [row for row in whole if row[:2] > (1, 2)]
        assert twice == [row for row in whole if row[:2] > (1, 4)]


@pytest.mark.dist
def test_resumed_workers_can_be_saved_and_resumed_again(tmp_path: pathlib.Path) -> None:
    for case in ("random", "persistent, random"):
        make = IN_WORKERS[case]
        whole = train(make, tmp_path, ((1, 1),))
        once = train(make, tmp_path, ((1, 4), (2, 1)), resume=tmp_path / "1-1.ckpt")
        assert once == [row for row in whole if row[:2] > (1, 1)]
        for place in ((1, 4), (2, 1)):
            twice = train(make, tmp_path, resume=tmp_path / f"{place[0]}-{place[1]}.ckpt")
            assert twice == [row for row in whole if row[:2] > place]


def test_the_iterator_is_the_loaders_own() -> None:
    """No frame of ours per batch: torch's iterator comes out, its index stream runs behind a C chain."""
    loader = loader_of(shuffle=True)
    sampler, collate = loader.batch_sampler, loader.collate_fn
    batches = iter(DataPosition(loader))
    assert type(batches).__name__ == "_SingleProcessDataLoaderIter"
    assert type(batches._sampler_iter) is itertools.chain
    assert loader.batch_sampler is sampler and loader.collate_fn is collate and loader.worker_init_fn is None
    assert len(batches) == len(loader) == 6
    assert len(list(batches)) == 6 and len(list(loader)) == 6


@pytest.mark.dist
@pytest.mark.parametrize("case", ["random", "persistent, random"])
def test_closing_stops_the_workers_and_keeps_the_position(case: str) -> None:
    loader = IN_WORKERS[case]()
    position = DataPosition(loader)
    batches: Any = iter(position)
    next(batches)
    workers, before = list(batches._workers), position.state_dict()
    assert all(worker.is_alive() for worker in workers)
    position.close()
    assert not any(worker.is_alive() for worker in workers)
    assert rng.equal(position.state_dict(), before)
    assert len(list(position)) == 6, "another epoch begins with new workers"


@pytest.mark.dist
@pytest.mark.parametrize("make", [IN_WORKERS["random"], REPLAYED["iterable dataset, workers"]])
def test_an_iterator_that_is_dropped_stops_its_workers_at_once(make: Callable[[], Any]) -> None:
    """Without waiting for the garbage collector: it is no part of a cycle."""
    gc.disable()
    try:
        position = DataPosition(make())
        batches = iter(position)
        next(batches)
        workers = multiprocessing.active_children()
        assert len(workers) >= 2
        del batches, position
        assert not any(worker.is_alive() for worker in workers[-2:])
    finally:
        gc.enable()


def test_order_is_that_of_a_plain_loop() -> None:
    for make in IN_PROCESS.values():
        seed_all(3)
        plain = [[plain_of(batch) for batch in data] for data in [make()] for _ in range(2)]
        after = rng.capture()
        seed_all(3)
        position = DataPosition(make())
        assert [[plain_of(batch) for batch in position] for _ in range(2)] == plain
        assert rng.equal(rng.capture(), after)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "persistent_workers": True}], ids=str)
def test_order_and_draws_of_workers_are_those_of_a_plain_loop(options: dict[str, Any]) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Numbers(8, draws="tw"), batch_size=2, num_workers=2, **options)

    seed_all(3)
    plain = [[plain_of(batch) for batch in data] for data in [loader()] for _ in range(2)]
    after = rng.capture()
    seed_all(3)
    position = DataPosition(loader())
    assert [[plain_of(batch) for batch in position] for _ in range(2)] == plain
    assert rng.equal(rng.capture(), after)
    assert plain[0] != plain[1]  # an epoch's augmentations are not those of the epoch before
    position.close()


def test_state_is_small() -> None:
    path_free = _state_after(loader_of(shuffle=True), 3)
    size = sum(t.numel() * t.element_size() for t in _tensors(path_free))
    assert size < 32_000, size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def test_a_loader_with_its_own_state(tmp_path: pathlib.Path) -> None:
    class Stateful:
        """Numbers its batches through all epochs, five to an epoch."""

        def __init__(self) -> None:
            self.given = 0

        def __iter__(self) -> Iterator[int]:
            while True:
                self.given += 1
                yield self.given
                if self.given % 5 == 0:
                    return

        def state_dict(self) -> dict[str, int]:
            return {"given": self.given}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.given = state["given"]

    assert_resumed_is_the_tail(Stateful, tmp_path, ((0, 1), (1, 3), (1, -1)))
    position = DataPosition(Stateful())
    batches = iter(position)
    next(batches), next(batches)
    assert not position.prefetch_safe and "Stateful" in position.explain()
    with pytest.raises(DataError, match="1 batches were consumed and 2 handed out"):
        position.state_dict(1)


def test_an_exhausted_epoch_goes_on_with_nothing() -> None:
    for make in (IN_PROCESS["shuffled"], IN_PROCESS["list"]):
        data = make()
        state = _state_after(data, len(data))
        _, batches = _resumed(make(), state)
        assert list(batches) == []


def test_nothing_begun_and_nothing_consumed(tmp_path: pathlib.Path) -> None:
    position = DataPosition(loader_of(shuffle=True))
    state = position.state_dict()
    resumed = DataPosition(loader_of(shuffle=True))
    resumed.load_state_dict(state)
    assert resumed.handed_out == 0 and len(list(resumed)) == 6
    seed_all(1)
    batches = iter(position)
    state = {"position": position.state_dict(), "rng": rng.capture()}
    expected = [plain_of(batch) for batch in batches]
    resumed = DataPosition(loader_of(shuffle=True))
    resumed.load_state_dict(state["position"])
    rng.restore(state["rng"])
    assert [plain_of(batch) for batch in resumed] == expected


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (
            loader_of,
            lambda: loader_of(shuffle=True),
            "sampler was 'SequentialSampler' and is 'RandomSampler'",
        ),
        (loader_of, lambda: DataLoader(Numbers(24), batch_size=4), "length was 23 and is 24"),
        (loader_of, lambda: [1, 2, 3], "is a list of batches"),
        (lambda: [1, 2, 3], lambda: [1, 2], "batches was 3 and is 2"),
    ],
)
def test_data_that_changed_is_refused(then: Any, now: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _resumed(now(), _state_after(then(), 2))


def test_batches_of_another_size_go_on_with_the_samples_that_are_left() -> None:
    for options in ({}, {"shuffle": True}, {"shuffle": True, "generator": own_generator()}):
        seed_all(0)
        position = DataPosition(loader_of(**options))
        batches = iter(position)
        next(batches), next(batches)
        state = position.state_dict()
        left = [row[0].item() for batch in batches for row in batch]
        resumed = DataPosition(loader_of(**{**options, "batch_size": 7}))
        resumed.load_state_dict(state)
        assert resumed.epoch_length == 2 + 3
        taken = [batch[:, 0].tolist() for batch in resumed]
        assert [i for batch in taken for i in batch] == left and [len(batch) for batch in taken] == [7, 7, 1]
        assert resumed.handed_out == 5


def test_data_that_changed_between_epochs_is_allowed() -> None:
    position = DataPosition(loader_of())
    list(position)
    position.end_epoch()
    _, batches = _resumed(loader_of(batch_size=3), position.state_dict())
    assert len(list(batches)) == 8


def test_a_sampler_with_a_hidden_state_is_found_out() -> None:
    class Rotating(Sampler[int]):
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            self.epoch += 1
            return iter([(i + self.epoch) % 23 for i in range(23)])

        def __len__(self) -> int:
            return 23

    position = DataPosition(loader_of(sampler=Rotating()))
    list(position)
    next(iter(position))
    with pytest.raises(DataError, match="Rotating gives this epoch another order"):
        _resumed(loader_of(sampler=Rotating()), position.state_dict())


def test_a_sampler_that_draws_all_along_is_said(tmp_path: pathlib.Path) -> None:
    class Lazy(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return (random.randrange(23) for _ in range(23))

        def __len__(self) -> int:
            return 23

    with pytest.warns(UserWarning, match="Lazy draws from the process-wide generators all through an epoch"):
        assert_resumed_is_the_tail(lambda: loader_of(sampler=Lazy()), tmp_path, PLACES, quiet=False)


def test_a_buffer_that_draws_between_the_steps_is_said() -> None:
    state = _state_after(DataLoader(Stream(), batch_size=4), 3)
    with pytest.warns(UserWarning, match="draws from the process-wide generators between the steps"):
        _resumed(DataLoader(Stream(), batch_size=4), state)


def test_a_shorter_iterable_is_refused() -> None:
    with pytest.raises(DataError, match="3 batches into an epoch, and the data ended after 2"):
        state = _state_after((i for i in range(5)), 3)
        _resumed((i for i in range(2)), state)


def test_what_cannot_be_iterated_is_refused() -> None:
    with pytest.raises(DataError, match="int cannot be iterated"):
        DataPosition(3)


def test_consumed_is_checked() -> None:
    position = DataPosition([1, 2, 3])
    next(iter(position))
    with pytest.raises(DataError, match="consumed=2 batches of an epoch that has handed out 1"):
        position.state_dict(2)


@pytest.mark.dist
def test_another_number_of_workers_keeps_the_samples_and_says_what_does_not_repeat() -> None:
    def samples(batches: Iterator[torch.Tensor]) -> list[list[float]]:
        return [batch[:, 0].tolist() for batch in batches]

    torch.set_num_threads(1)
    for draws, workers in (("t", 1), ("", 1), ("", 0)):
        seed_all(0)
        position = DataPosition(loader_of(draws, shuffle=True, num_workers=2))
        batches = iter(position)
        next(batches), next(batches), next(batches)
        state = position.state_dict()
        expected = samples(batches)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _, rest = _resumed(loader_of(draws, shuffle=True, num_workers=workers), state)
            assert samples(rest) == expected
        assert any("num_workers was 2 and is 1" in str(w.message) for w in said) is (draws == "t")


def test_set_epoch_reaches_every_sampler_once() -> None:
    calls: list[int] = []

    class Sampler(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:
            calls.append(epoch)

    sampler = Sampler(Numbers(), num_replicas=1, rank=0)
    for loader in (loader_of(sampler=sampler), loader_of(batch_sampler=BatchSampler(sampler, 2, False))):
        DataPosition(loader).set_epoch(7)
    assert calls == [7, 7]


def test_set_epoch_of_a_batch_sampler_is_left_to_the_program() -> None:
    class Buckets(BatchSampler):
        def set_epoch(self, epoch: int) -> None:
            raise AssertionError

    DataPosition(loader_of(batch_sampler=Buckets(range(4), 2, False))).set_epoch(1)


def test_a_copy_begins_anew() -> None:
    position = DataPosition(loader_of(shuffle=False))
    first = next(iter(position))
    assert torch.equal(torch.as_tensor(next(iter(copy.deepcopy(position)))), torch.as_tensor(first))


@pytest.mark.parametrize("workers", [0, 1])
def test_draw_draws_what_an_iterator_draws(workers: int) -> None:
    loader = loader_of(shuffle=True, num_workers=workers)
    torch.manual_seed(5)
    _ = iter(loader)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    DataPosition(loader).draw()
    assert torch.equal(torch.get_rng_state(), expected)
