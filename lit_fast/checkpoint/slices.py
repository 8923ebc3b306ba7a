"""Between whole tensors and the parts of them that processes hold (DTensors), and between ids and names.

In a file, an optimizer's state is torch's: parameters have numbers, in the order of the param groups. In a sharded
checkpoint they have their names in the model, as torch.distributed.checkpoint writes them, and Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `whole`, laid out as `like` is; `whole` itself where `like` is no DTensor.

    Nothing is sent: every process cuts out its own part.
    """
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    local = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return _as_dtensor(local.to(like.device, copy=True).contiguous(), whole.shape, like)


def empty_part(shape: Iterable[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for this process's part of a tensor of that shape, laid out as `like`."""
    size = torch.Size(shape)
    if not isinstance(like, DTensor):
        return torch.empty(size, dtype=dtype)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, _ = compute_local_shape_and_global_offset(size, like.device_mesh, like.placements)
    return _as_dtensor(torch.empty(local, dtype=dtype, device=like.device), size, like)


def _as_dtensor(local: Tensor, shape: torch.Size, like: DTensor) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def whole_of(value: Any, keep: bool = True) -> Any:
    """The same containers with every DTensor in them whole, in CPU memory. All processes must call it.

    Args:
        keep: False throws away what was gathered, in processes that only take part.
    """
    if isinstance(value, DTensor):
        whole: Tensor = value.full_tensor().detach()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        made = value.copy()  # keeps the class and attributes of a state_dict
        for key, inner in value.items():
            made[key] = whole_of(inner, keep)
        return made
    if type(value) in (list, tuple):
        return type(value)(whole_of(inner, keep) for inner in value)
    return value


def by_name(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """The optimizer's state with parameters called by their names in the model."""
    state = optimizer.state_dict()
    called: dict[int, str] = {}
    for group, held in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for number, param in zip(held["params"], group["params"], strict=True):
            called[number] = names.get(param, f"parameter {number}")
    groups = [{**group, "params": [called[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {called[number]: held for number, held in state["state"].items()}, "param_groups": groups}


def by_number(named: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `by_name`: numbers in the order of the param groups, as in `Optimizer.state_dict`."""
    numbers: dict[str, int] = {}
    groups = []
    for group in named["param_groups"]:
        groups.append({**group, "params": [numbers.setdefault(name, len(numbers)) for name in group["params"]]})
    return {"state": {numbers[name]: held for name, held in named.get("state", {}).items()}, "param_groups": groups}


def parts_of_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state by numbers with each tensor of a parameter's shape cut as that parameter is."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(params) != len(numbers):
        return dict(state)  # `load_state_dict` says what does not fit
    of: dict[int, Tensor] = dict(zip(numbers, params, strict=True))

    def cut(value: Any, param: Tensor) -> Any:
        return part_of(value, param) if isinstance(value, Tensor) and value.shape == param.shape else value

    held = {number: {key: cut(value, of[number]) for key, value in slots.items()}
            for number, slots in state["state"].items()}  # fmt: skip
    return {"state": held, "param_groups": state["param_groups"]}
