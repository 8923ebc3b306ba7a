"""Finding the generators that data owns, and telling what changed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lit_fast.data.randomness import Randomness, apply, changes, check_shape, find_generators
from lit_fast.errors import DataError


class _Box:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def test_generators_are_found_by_path_once_and_within_limits() -> None:
    shared = torch.Generator()
    inner = _Box(transforms=[_Box(rng=random.Random(1)), {"noise": np.random.default_rng(1)}])
    box = _Box(generator=shared, again=shared, inner=inner, samples=[_Box(g=random.Random(i)) for i in range(500)])
    box.cycle = box
    found = find_generators(data=box, other=None)
    assert found["data.generator"] is shared and "data.again" not in found
    assert {"data.inner.transforms.0.rng", "data.inner.transforms.1.noise"} <= found.keys()
    assert len(found) == 3 + 64, "a list of samples is looked at, not walked through"


def test_changes_and_apply_are_inverse() -> None:
    box = _Box(own=random.Random(2))
    randomness = Randomness(data=box)
    before = randomness.capture()
    torch.rand(1)
    box.own.random()
    after = randomness.capture()
    changed = changes(before, after)
    assert list(changed["process"]) == ["torch"] and list(changed["own"]) == ["data.own"]
    expected = torch.rand(1), box.own.random(), random.random()
    randomness.restore(apply(before, changed))
    assert (torch.rand(1), box.own.random(), random.random()) == expected


def test_a_generator_that_is_gone_is_said() -> None:
    state = Randomness(data=_Box(own=random.Random(2))).capture_own()
    with pytest.warns(UserWarning, match=r"does not have now: data\.own"):
        Randomness(data=_Box()).restore_own(state)


def test_shapes_are_compared_where_both_are_known() -> None:
    check_shape({"length": 3, "batches": None}, {"length": 3, "batches": 5})
    with pytest.raises(DataError, match="length was 3 and is 4; batch_size was 1 and is 2"):
        check_shape({"length": 3, "batch_size": 1}, {"length": 4, "batch_size": 2})
