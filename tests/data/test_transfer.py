"""A batch's way to the device: structure, order and errors survive, and nothing is copied in vain."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from lit_fast.data.transfer import PrefetchToDevice, move, walk

CPU, META = torch.device("cpu"), torch.device("meta")


class _Pair(NamedTuple):
    x: Any
    y: Any


class _List(list[Any]):
    pass


@dataclasses.dataclass(frozen=True)
class _Frozen:
    x: Any
    name: str = "a"
    computed: Any = dataclasses.field(init=False, default=3)


class _Graph:
    """Moves itself, as graph libraries' batches do."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> _Graph:
        return _Graph(self.x.to(device))


def _batch() -> dict[str, Any]:
    x = torch.ones(2)
    return {
        "tensor": x,
        "list": [x, 1, "a"],
        "own list": _List([x]),
        "tuple": (x, None, 2.5),
        "named": _Pair(x, {"deep": (x,)}),
        "ordered": collections.OrderedDict(b=x, a=x),
        "default": collections.defaultdict(list, a=[x]),
        "frozen": _Frozen(x),
        "graph": _Graph(x),
        "set": {1, 2},
        "object": CPU,
        "parameter": torch.nn.Parameter(x),
    }


def test_everything_in_a_batch_moves_and_keeps_its_type() -> None:
    batch = _batch()
    moved = move(batch, META)
    kinds = {key: type(value) for key, value in batch.items()} | {"parameter": torch.Tensor}
    assert {key: type(value) for key, value in moved.items()} == kinds
    tensors = [
        moved["tensor"],
        moved["list"][0],
        moved["own list"][0],
        moved["tuple"][0],
        moved["named"].x,
        moved["named"].y["deep"][0],
        *moved["ordered"].values(),
        moved["default"]["a"][0],
        moved["frozen"].x,
        moved["graph"].x,
        moved["parameter"],
    ]
    assert all(tensor.device == META for tensor in tensors)
    assert list(moved["ordered"]) == ["b", "a"] and moved["default"].default_factory is list
    assert moved["list"][1:] == [1, "a"] and moved["tuple"][1:] == (None, 2.5)
    assert moved["frozen"].name == "a" and moved["frozen"].computed == 3
    assert moved["set"] is batch["set"] and moved["object"] is CPU
    assert batch["tensor"].device == CPU and batch["frozen"].x.device == CPU, "the batch itself is not changed"


def test_packed_sequences_move_as_they_know_how() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert move(packed, META).data.device == META


def test_what_is_there_already_is_the_same_object() -> None:
    batch = _batch()
    del batch["graph"]
    assert move(batch, CPU) is batch
    for item in (batch["tensor"], [batch["tensor"]] * 2, "text", 3, None):
        assert move(item, CPU) is item


def test_walk_copies_only_what_changed() -> None:
    batch = {"a": [torch.ones(1)], "b": [torch.zeros(1)]}
    walked = walk(batch, lambda tensor: tensor + 1 if tensor.item() else tensor)
    assert walked["a"][0].item() == 2 and walked["b"] is batch["b"] and batch["a"][0].item() == 1


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_keeps_order_and_counts(ahead: int) -> None:
    taken: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        for number in range(5):
            taken.append(number)
            yield torch.tensor(number)

    batches = PrefetchToDevice(source(), CPU, ahead)
    for number in range(5):
        assert next(batches).item() == number
        assert batches.given == number + 1
        assert batches.fetched == len(taken) == min(number + 1 + ahead, 5)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)
    assert batches.given == 5


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_when_its_batch_is_asked_for(ahead: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("a file is gone")

    batches = PrefetchToDevice(source(), CPU, ahead)
    assert next(batches) == 1
    with pytest.raises(OSError, match="a file is gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_ctrl_c_is_not_kept_for_later() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(PrefetchToDevice(source(), CPU, 1))


def test_a_negative_number_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="ahead=-1"):
        PrefetchToDevice(iter(()), CPU, -1)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 1])
def test_batches_on_the_gpu_are_whole_whatever_runs_beside_them(ahead: int) -> None:
    """Memory given out too early would be overwritten by a later batch while a slow kernel still reads it."""
    device = torch.device("cuda", torch.cuda.current_device())
    sums = []
    source = ({"x": torch.full((1 << 20,), float(i)), "g": _Graph(torch.full((8,), float(i)))} for i in range(30))
    for batch in PrefetchToDevice(source, device, ahead):
        torch.cuda._sleep(2_000_000)  # the reading below starts long after the host has gone on
        sums.append((batch["x"].double().sum(), batch["g"].x.double().sum()))
        del batch
    assert [(x.item(), g.item()) for x, g in sums] == [(float(i << 20), 8.0 * i) for i in range(30)]


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batches = PrefetchToDevice(iter([torch.ones(1 << 16)] * 4), device, 1)
    next(batches)
    busy = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    busy.record()
    next(batches)
    next(batches)
    assert not busy.query(), "asking for a batch waited for kernels that were queued before"


@pytest.mark.gpu
def test_pageable_memory_is_not_copied_behind_the_hosts_back() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch = torch.zeros(1 << 22)
    moved = move(batch, device, non_blocking=True)
    batch.fill_(1.0)
    assert moved.sum().item() == 0.0
