"""A ledger of sample ids over processes that come and go: each once, none missing. And epochs that end together."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from position_cases import Numbers, Resumable, seed_all
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler

from lit_fast.checkpoint import io, rng
from lit_fast.data.combined import CombinedLoader
from lit_fast.data.distributed import agree_on_length, for_rank, together
from lit_fast.data.position import DataPosition
from lit_fast.data.samplers import distribute
from lit_fast.errors import DataError, PossibleUserWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:The data is read in order by its loader"),
]
States = list[dict[str, Any]]


class Run:
    """The processes of one run, side by side in this one, and what each of them draws."""

    def __init__(self, make: Any, world: int, states: States | None = None, seed: int = 0) -> None:
        share = [{"num_replicas": world, "rank": rank} if world > 1 else None for rank in range(world)]
        self.loaders = [distribute([make()], "train", "data", each)[0] for each in share]
        self.positions = [DataPosition(loader) for loader in self.loaders]
        self.generators = []
        for rank in range(world):
            seed_all(seed + rank)  # processes need not draw the same
            self.generators.append(rng.capture())
        self.done = 0  # batches of this epoch, in each process
        self.lengths = [len(loader) for loader in self.loaders]
        self.iterators: list[Iterator[Any]] = []
        if states is not None:
            for rank, position in enumerate(self.positions):
                position.load_state_dict(for_rank(states, rank, world))
            if positions_length := [position.epoch_length for position in self.positions]:
                self.lengths = [a if b is None else b for a, b in zip(self.lengths, positions_length, strict=True)]
            assert len(set(self.lengths)) == 1, "as many batches in each process"
            self.done = self.positions[0].handed_out
        self._each(self._begin)

    def _each(self, function: Any) -> list[Any]:
        """Call a function for each rank, each with the random state of its process."""
        results = []
        for rank in range(len(self.positions)):
            rng.restore(self.generators[rank])
            results.append(function(rank))
            self.generators[rank] = rng.capture()
        return results

    def _begin(self, rank: int) -> None:
        self.iterators.append(iter(self.positions[rank]))

    def epoch(self, epoch: int) -> None:
        for position in self.positions:
            position.end_epoch()
            position.set_epoch(epoch)
        self.iterators, self.done = [], 0
        self.lengths = [len(loader) for loader in self.loaders]
        self._each(self._begin)

    def steps(self, count: int | None = None) -> list[list[Any]]:
        """So many batches of every process, or all that are left; the ids in them."""
        count = self.lengths[0] - self.done if count is None else min(count, self.lengths[0] - self.done)
        taken = []
        for _ in range(count):
            taken.append(self._each(lambda rank: ids(next(self.iterators[rank]))))
        self.done += count
        if self.done == self.lengths[0]:
            assert all(next(iterator, None) is None for iterator in self.iterators)
        return taken

    def save(self) -> States:
        return [position.state_dict(self.done) for position in self.positions]

    def close(self) -> None:
        for position in self.positions:
            position.close()


def ids(batch: Any) -> list[int]:
    return [int(row) for row in (batch[:, 0] if batch.ndim > 1 else batch).tolist()]


def flat(taken: list[list[list[int]]]) -> list[int]:
    return [i for step in taken for batch in step for i in batch]


@st.composite
def histories(draw: Any) -> dict[str, Any]:
    segments = draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4)), min_size=2, max_size=4)
    )
    return {
        "samples": draw(st.integers(1, 90)),
        "segments": segments,  # processes, batch size, batches until the next checkpoint
        "kind": draw(st.sampled_from(["in order", "shuffled", "generator", "subset", "batches", "torch"])),
        "epoch": draw(st.integers(0, 2)),
        "drop_last": draw(st.booleans()),
    }


def loader_of(history: dict[str, Any], batch_size: int) -> DataLoader[Any]:
    data, kind, drop_last = range(history["samples"]), history["kind"], history["drop_last"]
    if kind == "subset":
        return DataLoader(data, batch_size, sampler=SubsetRandomSampler(data), drop_last=drop_last)
    if kind == "batches":
        return DataLoader(data, batch_sampler=[[i] for i in reversed(data)])
    generator = torch.Generator().manual_seed(5) if kind == "generator" else None
    return DataLoader(data, batch_size, shuffle=kind != "in order", generator=generator, drop_last=drop_last)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_ledger(history: dict[str, Any]) -> None:
    """However often a run is stopped, and by however many processes it goes on: each sample once, none missing."""
    segments, samples = history["segments"], history["samples"]
    ledger: list[int] = []
    states: States | None = None
    repeats = 0
    for number, (world, size, batches) in enumerate(segments):
        run = Run(lambda size=size: loader_of(history, size), world, states, seed=10 * number)
        if states is None:
            for epoch in range(1, history["epoch"] + 1):
                assert set(flat(run.steps())) <= set(range(samples))
                run.epoch(epoch)
        last = number == len(segments) - 1
        ledger += flat(run.steps(None if last else batches))
        repeats += world if run.done == run.lengths[0] else 0
        states = run.save()
        if run.done == run.lengths[0]:
            break
    assert set(ledger) <= set(range(samples))
    dropped = (world * size) if history["drop_last"] and history["kind"] != "batches" else 1
    assert len(set(ledger)) > samples - dropped, "none missing, but for an incomplete last batch that is dropped"
    assert len(ledger) - len(set(ledger)) < world, "repeated only at the end, in processes without a last sample"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("now", [1, 2, 3, 4, 5])
def test_four_processes_saved_and_others_go_on(now: int, shuffle: bool) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(120), batch_size=3, shuffle=shuffle)

    four = Run(make, 4)
    four.steps()
    four.epoch(1)
    before = flat(four.steps(4))
    assert len(before) == len(set(before)) == 48
    other = Run(make, now, [dict(each) for each in four.save()])
    other_steps = other.steps()
    assert sorted(before + flat(other_steps)) == list(range(120)) and len(other_steps) == -(-72 // (3 * now))
    if now > 1:  # it goes on in torch's order, and the next epoch is torch's again
        sampler = DistributedSampler(range(120), 1, 0, shuffle=True, seed=0)
        sampler.set_epoch(1)
        order = list(sampler)
        in_turn = [i for step in other_steps for k in range(3) for batch in step for i in batch[k : k + 1]]
        assert in_turn == order[48:]
        other.epoch(2)
        sampler.set_epoch(2)
        assert [i for step in other.steps() for k in range(3) for batch in step for i in batch[k : k + 1]] == list(
            sampler
        )


def test_states_survive_the_disk(tmp_path: Any) -> None:
    run = Run(lambda: DataLoader(range(24), batch_size=2, sampler=SubsetRandomSampler(range(24))), 3)
    seen = flat(run.steps(2))
    io.save({"data": run.save()}, tmp_path / "a.ckpt")
    two = Run(
        lambda: DataLoader(range(24), batch_size=2, sampler=SubsetRandomSampler(range(24))),
        2,
        io.load(tmp_path / "a.ckpt")["data"],
    )
    seen += flat(two.steps(1))
    io.save({"data": two.save()}, tmp_path / "b.ckpt")
    one = Run(
        lambda: DataLoader(range(24), batch_size=2, sampler=SubsetRandomSampler(range(24))),
        1,
        io.load(tmp_path / "b.ckpt")["data"],
    )
    assert sorted(seen + flat(one.steps())) == list(range(24))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.dist)])
def test_as_many_processes_go_on_to_the_bit(workers: int) -> None:
    """Also inside what was dealt out anew: batches, and what workers draw."""

    def make() -> DataLoader[Any]:
        return DataLoader(Numbers(60, draws="tn"), batch_size=2, shuffle=True, num_workers=workers)

    def rows(run: Run, steps: int | None = None) -> list[Any]:
        count = run.lengths[0] - run.done if steps is None else steps
        run.done += count
        return [run._each(lambda rank: next(run.iterators[rank]).tolist()) for _ in range(count)]

    torch.set_num_threads(1)
    three = Run(make, 3)
    rows(three, 3)
    saved, generators = three.save(), list(three.generators)
    whole = rows(three)
    again = Run(make, 3, saved)
    again.generators = generators
    assert rows(again) == whole
    two = Run(make, 2, saved)
    left = rows(two, 3)
    saved_two, generators_two = two.save(), list(two.generators)
    rest = rows(two)
    assert sorted(int(row[0]) for step in [*left, *rest] for batch in step for row in batch) == sorted(
        int(row[0]) for step in whole for batch in step for row in batch
    )
    resumed = Run(make, 2, saved_two)
    resumed.generators = generators_two
    assert rows(resumed) == rest
    for run in (three, again, two, resumed):
        run.close()


@pytest.mark.dist
def test_ledger_with_workers() -> None:
    torch.set_num_threads(1)
    for then, now in ((4, 2), (1, 3), (2, 1)):

        def make() -> DataLoader[Any]:
            return DataLoader(Numbers(48), batch_size=2, shuffle=True, num_workers=1)

        first = Run(make, then)
        seen = flat(first.steps(3))
        second = Run(make, now, first.save())
        assert sorted(seen + flat(second.steps())) == list(range(48))
        first.close(), second.close()


def test_the_end_of_an_epoch_and_its_beginning() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(16), batch_size=2, shuffle=True)

    four = Run(make, 4)
    begun = four.save()
    assert sorted(flat(Run(make, 2, begun).steps())) == list(range(16))
    four.steps()
    states = [position.state_dict(finished=True) for position in four.positions]
    for world in (1, 2, 4):
        run = Run(make, world, states)
        assert run.done == 0 and sorted(flat(run.steps())) == list(range(16))


def test_the_state_of_one_process_alone_is_enough_for_a_ledger() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(48), batch_size=2, shuffle=True)

    four = Run(make, 4)
    seen = flat(four.steps(3))
    (state,) = [{**position.state_dict(), "world_size": 4} for position in four.positions[2:3]]
    for world in (1, 3, 4):
        assert sorted(seen + flat(Run(make, world, [state]).steps())) == list(range(48))


def test_another_seed_goes_on_in_the_saved_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(16), batch_size=2, shuffle=True)

    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    two = Run(make, 2)
    seen = flat(two.steps(2))
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert sorted(seen + flat(Run(make, 2, two.save()).steps())) == list(range(16))


def test_what_is_said_and_refused() -> None:
    def make(**options: Any) -> DataLoader[Any]:
        return DataLoader(range(16), **{"batch_size": 2, **options})

    two = Run(make, 2)
    two.steps(2)
    states = two.save()
    with pytest.raises(DataError, match="length was 16 and is 15"):
        Run(lambda: DataLoader(range(15), batch_size=2), 3, states)
    with pytest.raises(DataError, match="not at the same place in their data"):
        for_rank([two.positions[0].state_dict(1), states[1]], 0, 3)
    with pytest.raises(DataError, match="the sampler was DistributedSampler and is list"):
        Run(lambda: make(sampler=list(range(16))), 3, states)
    with pytest.raises(DataError, match="Resumable saves its own position"):
        run = DataPosition(DataLoader(Resumable(), batch_size=2))
        next(iter(run))
        DataPosition(DataLoader(Resumable(), batch_size=2)).load_state_dict(for_rank([run.state_dict()], 1, 2))


def test_a_list_of_batches_is_every_processes() -> None:
    position = DataPosition([1, 2, 3, 4])
    next(iter(position))
    for rank in range(3):
        other = DataPosition([1, 2, 3, 4])
        other.load_state_dict(for_rank(position.state_dict(), rank, 3))
        assert list(other) == [2, 3, 4]


class Dealt(IterableDataset[int]):
    """Deals its numbers out in turn."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 48, self.world))


@pytest.mark.parametrize(("then", "now", "steps", "over"), [(4, 2, 3, 0), (2, 4, 4, 0), (2, 3, 3, 0), (4, 3, 2, 4)])
def test_a_stream_that_deals_itself_out(then: int, now: int, steps: int, over: int) -> None:
    def positions(world: int) -> list[DataPosition]:
        return [DataPosition(DataLoader(Dealt(rank, world), batch_size=2)) for rank in range(world)]

    first, second = positions(then), positions(now)
    seen = [i for each in first for batch in itertools.islice(iter(each), steps) for i in ids(batch)]
    states = [each.state_dict() for each in first]
    for rank, each in enumerate(second):
        each.load_state_dict(for_rank(states, rank, now))
        with pytest.warns(UserWarning, match=f"{then} processes read from") as said:
            batches = iter(each)
        assert any("which come twice" in str(w.message) for w in said) is bool(over)
        seen += [i for batch in itertools.islice(batches, 1) for i in ids(batch)]
        states_now = each.state_dict()
        assert states_now["consumed"] == states[0]["consumed"] + 1
        seen += [i for batch in batches for i in ids(batch)]
    assert sorted(set(seen)) == list(range(48)) and len(seen) == 48 + over


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
@pytest.mark.parametrize(("then", "now"), [(4, 2), (2, 3), (1, 2), (2, 1)])
def test_several_loaders(mode: str, then: int, now: int) -> None:
    def positions(world: int) -> list[DataPosition]:
        made = []
        for rank in range(world):
            loaders = [DataLoader(range(72), batch_size=2, shuffle=True), DataLoader(range(100, 124), batch_size=1)]
            share = {"num_replicas": world, "rank": rank} if world > 1 else None
            made.append(DataPosition(CombinedLoader(distribute(loaders, "train", "data", share), mode)))
        return made

    first, second = positions(then), positions(now)
    taken = [list(itertools.islice(iter(each), 3)) for each in first]
    states = [each.state_dict() for each in first]
    lengths = set()
    for rank, each in enumerate(second):
        each.load_state_dict(for_rank(states, rank, now))
        length = each.epoch_length
        lengths.add(length)
        batches = list(each)
        assert len(batches) + 3 == length == each.handed_out
        taken.append(batches)
    assert len(lengths) == 1
    long = [i for each in taken for batch in each if batch[0] is not None for i in ids(batch[0])]
    short = [i for each in taken for batch in each if batch[1] is not None for i in ids(batch[1])]
    if mode != "min_size":
        assert sorted(long) == list(range(72))
    if mode != "max_size_cycle":
        assert len(short) - 24 == (then == 1)  # 21 samples for two processes: one is repeated
    assert set(short) == set(range(100, 124))


# -- uneven ends


class Board:
    """The answers of processes, here threads: one is known when all have asked."""

    def __init__(self, world: int) -> None:
        self.changed = threading.Condition()
        self.answers: list[list[bool | None]] = []
        self.asked = [0] * world

    def agree(self, rank: int) -> Any:
        def ask(has_batch: bool) -> Board.Answer:
            with self.changed:
                if self.asked[rank] == len(self.answers):
                    self.answers.append([None] * len(self.asked))
                answer = self.answers[self.asked[rank]]
                answer[rank] = has_batch
                self.asked[rank] += 1
                self.changed.notify_all()
            return Board.Answer(self, answer)

        return ask

    class Answer:
        def __init__(self, board: Board, answer: list[bool | None]) -> None:
            self.board, self.answer = board, answer

        def wait(self) -> list[int]:
            with self.board.changed:
                assert self.board.changed.wait_for(lambda: None not in self.answer, timeout=20)
            return [rank for rank, has_batch in enumerate(self.answer) if not has_batch]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_epochs_end_together(lengths: list[int]) -> None:
    board = Board(len(lengths))
    with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor(len(lengths)) as threads:
        warnings.simplefilter("always")
        runs = [
            threads.submit(lambda rank=rank, length=length: list(together(iter(range(length)), board.agree(rank))))
            for rank, length in enumerate(lengths)
        ]
        taken = [run.result(timeout=20) for run in runs]
    shortest = min(lengths)
    assert taken == [list(range(shortest))] * len(lengths)
    assert len(said) == sum(length > shortest for length in lengths)
    for warning in said:
        assert f"ends here after {shortest} batches" in str(warning.message)
        assert f" {lengths.index(shortest)}" in str(warning.message)


def test_the_question_is_asked_before_the_batch_before_is_used() -> None:
    log: list[str] = []

    class Answer:
        def __init__(self, has_batch: bool) -> None:
            log.append(f"ask {has_batch}")
            self.ended = [] if has_batch else [0]

        def wait(self) -> list[int]:
            log.append("wait")
            return self.ended

    for batch in together(iter("ab"), Answer):
        log.append(f"use {batch}")
    assert log == ["ask True", "wait", "ask True", "use a", "wait", "ask False", "use b", "wait"]


def test_lengths() -> None:
    assert agree_on_length([4, 4, 4], "data") == 4 and agree_on_length([4, None], "data") is None
    with pytest.warns(
        PossibleUserWarning, match="4 in process 0, 3 in process 1, 6 in process 2.* after 3 .* 4 batches"
    ):
        assert agree_on_length([4, 3, 6], "data") == 3
    with pytest.raises(DataError, match="no batch in process 1"):
        agree_on_length([4, 0], "data")
