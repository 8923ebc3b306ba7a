"""Nested collections: the same values as Lightning 2.6.6's functions gave."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch

from lit_fast.pytorch.apply import apply_to_collection, convert_tensors_to_scalars, convert_to_tensors

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Batch:
    x: int
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int


def ten(x: int, factor: int = 10) -> int:
    return x * factor


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, {"a": 2, "b": None}, "x", (3.0,)], [10, {"a": 20, "b": None}, "x", (3.0,)]),
        (Pair(1, "y"), Pair(10, "y")),
        (OrderedDict(a=1), OrderedDict(a=10)),
        (defaultdict(list, a=1), defaultdict(list, a=10)),
        (Batch(1), Batch(10)),
        (1, 10),
        ("text", "text"),
    ],
)
def test_every_item_of_a_type(given: object, expected: object) -> None:
    found = apply_to_collection(given, int, ten)
    assert found == expected and type(found) is type(expected)


def test_options() -> None:
    assert apply_to_collection({"a": True, "b": 2}, int, ten, 3, wrong_dtype=bool) == {"a": True, "b": 6}
    assert apply_to_collection([1, {"a": 2, "b": None}, "x"], int, lambda x: None, include_none=False) == [{}, "x"]
    frozen = Frozen(1)
    assert apply_to_collection(frozen, int, ten, allow_frozen=True) is frozen
    with pytest.raises(ValueError, match="Frozen is a frozen dataclass"):
        apply_to_collection(frozen, int, ten)


def test_numbers_to_tensors_and_back() -> None:
    made = convert_to_tensors({"a": 1, "b": [2.0, True, None, "s"]}, torch.device("cpu"))
    assert [made["a"].dtype, made["b"][0].dtype, made["b"][1].dtype] == [torch.int32, torch.float32, torch.uint8]
    assert made["b"][2:] == [None, "s"]
    assert convert_tensors_to_scalars({"a": torch.tensor(1.5), "b": [torch.tensor([3])]}) == {"a": 1.5, "b": [3]}
    with pytest.raises(ValueError, match=r"shape \(2,\) is no single number"):
        convert_tensors_to_scalars(torch.ones(2))
