"""Pairs of a torch optimizer and an adopted one on the same numbers, shared by the optimizer tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lit_fast.optim import AdoptedOptimizer, adopt

Make = Callable[[list[Parameter]], torch.optim.Optimizer]

# Around the widths of every vector unit and torch's own, no dimension, and nothing at all.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (7,), (8,), (9,), (15, 3), (33,), (32, 2), (5, 1, 13))


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params: Sequence[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train_both(
    make: Make,
    *,
    steps: int = 100,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    skip: int | None = None,
    **adopt_options: Any,
) -> tuple[torch.optim.Optimizer, AdoptedOptimizer]:
    """`steps` steps of torch's own optimizer and of an adopted one; parameter `skip` has a gradient every other."""
    ours, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    reference, adopted = make(theirs), adopt(make(ours), **adopt_options)
    assert adopted.compiled, adopted.reason
    for step in range(steps):
        for params in (ours, theirs):
            set_gradients(params, seed=1000 + step)
            if skip is not None and step % 2 == 0:
                params[skip].grad = None
        reference.step()
        adopted.step()
    assert adopted.compiled, adopted.reason
    return reference, adopted


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and state tensors by name."""
    named: dict[str, Tensor] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(params):
        named[f"{index}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            if value is not None:
                named[f"{index}.{key}"] = value
    return named


def assert_same_bits(reference: torch.optim.Optimizer, adopted: AdoptedOptimizer) -> None:
    """Same keys, dtypes, shapes and bits in every parameter and state; a NaN equals a NaN."""
    expected, actual = tensors_of(reference), tensors_of(adopted.optimizer)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].nan_to_num(nan=0.5), tensor.nan_to_num(nan=0.5)), name
        assert torch.equal(actual[name].signbit(), tensor.signbit()) or bool(tensor.isnan().any()), name
