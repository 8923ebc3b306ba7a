"""Functions on every item of a nested collection."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_TENSOR_OF: dict[type, torch.dtype] = {bool: torch.uint8, int: torch.int32, float: torch.float32}


def apply_to_collection(
    data: Any,
    dtype: Any,
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: Any = None,
    include_none: bool = True,
    allow_frozen: bool = False,
    **kwargs: Any,
) -> Any:
    """`data` with `function(item, *args, **kwargs)` in place of each item of type `dtype`.

    Args:
        data: mappings, lists, tuples, named tuples and dataclass instances in each other; new ones are returned.
        dtype: a type, or a tuple of types.
        wrong_dtype: items of these are left as they are, though they are of `dtype`.
        include_none: keep items for which the function returns None.
        allow_frozen: leave frozen dataclasses as they are, instead of raising.

    Raises:
        ValueError: an item of a frozen dataclass is of `dtype`.

    Example:
        >>> apply_to_collection({"a": 1, "b": ["c", 2]}, int, lambda item, factor: item * factor, 10)
        {'a': 10, 'b': ['c', 20]}
    """

    def walk(item: Any) -> Any:
        if isinstance(item, dtype) and not (wrong_dtype is not None and isinstance(item, wrong_dtype)):
            return function(item, *args, **kwargs)
        kind: Any = type(item)
        if isinstance(item, Mapping):
            pairs = [(key, new) for key, new in ((key, walk(value)) for key, value in item.items()) if kept(new)]
            if isinstance(item, defaultdict):
                return kind(item.default_factory, OrderedDict(pairs))
            return kind(OrderedDict(pairs))
        if isinstance(item, Sequence) and not isinstance(item, str):
            items = [new for new in map(walk, item) if kept(new)]
            return kind(*items) if hasattr(item, "_fields") else kind(items)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return of_dataclass(item)
        return item

    def kept(value: Any) -> bool:
        return include_none or value is not None

    def of_dataclass(item: Any) -> Any:
        result = copy.copy(item)
        for field in dataclasses.fields(item):
            value = getattr(item, field.name)
            new = walk(value) if field.init else value
            try:
                setattr(result, field.name, new if kept(new) else value)
            except dataclasses.FrozenInstanceError as error:
                if allow_frozen:
                    return item
                raise ValueError(
                    f"{type(item).__name__} is a frozen dataclass, whose items cannot be replaced; pass "
                    f"allow_frozen=True to leave it as it is."
                ) from error
        return result

    return walk(data)


def convert_to_tensors(data: Any, device: Any) -> Any:
    """Numbers and arrays of numpy in `data` as tensors on `device`, tensors moved there."""
    from lit_fast.data.transfer import move

    def tensor(value: Any) -> Tensor:
        return torch.tensor(value, dtype=_TENSOR_OF[type(value)], device=device)

    data = apply_to_collection(data, tuple(_TENSOR_OF), tensor)
    data = apply_to_collection(data, _arrays(), torch.from_numpy)
    return move(data, device)


def _arrays() -> tuple[type, ...]:
    try:
        import numpy
    except ImportError:
        return ()
    return (numpy.ndarray,)


def convert_tensors_to_scalars(data: Any) -> Any:
    """Tensors of one element in `data` as Python numbers.

    Raises:
        ValueError: a tensor has more than one.
    """

    def number(value: Tensor) -> Any:
        if value.numel() != 1:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} is no single number; reduce it first.")
        return value.item()

    return apply_to_collection(data, Tensor, number)
