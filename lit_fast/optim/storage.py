"""How an optimizer keeps its numbers: four options of a param group, and the tensors that they ask for.

| option        | values                              | meaning                                                |
|---------------|-------------------------------------|--------------------------------------------------------|
| `state_dtype` | None, "float32", "bfloat16", "8bit" | of the moments; None: the parameter's own, as in torch |
| `master`      | None, "float32", "remainder"        | what keeps a 16-bit parameter's value in float32       |
| `rounding`    | "nearest", "stochastic"             | of bfloat16 parameters and moments                     |
| `seed`        | an integer                          | of stochastic rounding and of 8-bit codes              |

Beside the names that torch uses, a parameter's state then holds `master` (float32), or `remainder` (int16: what the
bfloat16 parameter lacks of its float32 value, which is thereby known exactly), and for "8bit" in the place of a moment
`m` its codes `m_codes` (uint8) and `m_scale` (one float32 for each 256 of them). csrc/formulas/storage.h has the bits.

Random bits are a function of (seed, step, element's index among all elements of the optimizer): the same on any number
of threads, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_fast.errors import MisconfigurationException

CODE_BLOCK = 256  # codes that share a scale
DEFAULTS: dict[str, Any] = {"state_dtype": None, "master": None, "rounding": "nearest", "seed": 0}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "state_dtype": (None, "float32", "bfloat16", "8bit"),
    "master": (None, "float32", "remainder"),
    "rounding": ("nearest", "stochastic"),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def storage_options(**given: Any) -> dict[str, Any]:
    """The options by name, checked; dtypes may be given as torch's.

    Raises:
        MisconfigurationException: a value that is not allowed.
    """
    options = {name: _NAMES.get(value, value) if name == "state_dtype" else value for name, value in given.items()}
    for name, value in options.items():
        if name in _ALLOWED and value not in _ALLOWED[name]:
            allowed = ", ".join(map(repr, _ALLOWED[name]))
            raise MisconfigurationException(f"{name}={value!r}: allowed are {allowed}.")
    if not isinstance(options.get("seed", 0), int):
        raise MisconfigurationException(f"seed={options['seed']!r}: it must be an integer.")
    return options


def asks_for_storage(group: dict[str, Any]) -> bool:
    """Whether the group is kept in a way that torch's own step does not know."""
    return any(group.get(name, default) != default for name, default in DEFAULTS.items() if name != "seed")


def fill(entry: dict[str, Any], group: dict[str, Any], param: Tensor, moments: Iterable[str]) -> None:
    """Add what is missing of a parameter's state: zero moments, the master weight or remainder."""
    kind = group.get("state_dtype")
    for name in moments:
        if entry.get(name) is not None or f"{name}_codes" in entry:
            continue
        if kind == "8bit":
            entry.pop(name, None)
            entry[f"{name}_codes"] = torch.zeros_like(param, dtype=torch.uint8)
            entry[f"{name}_scale"] = torch.zeros(-(-param.numel() // CODE_BLOCK), device=param.device)
        else:
            entry[name] = torch.zeros_like(param, dtype=_DTYPES.get(str(kind), param.dtype))
    master = group.get("master")
    if param.dtype == torch.float32 or not master or (master if master == "remainder" else "master") in entry:
        return
    if master == "remainder":
        entry["remainder"] = torch.zeros_like(param, dtype=torch.int16)
    else:
        entry["master"] = param.detach().to(torch.float32)


def needs_steps(group: dict[str, Any]) -> bool:
    """Whether the step's number is asked for even by a formula that does not: random bits depend on it."""
    return group.get("rounding") == "stochastic" or group.get("state_dtype") == "8bit"


def keep_dtypes_on_load(optimizer: Optimizer) -> None:
    """Make `optimizer.load_state_dict` keep the dtypes of what it loads: torch casts every state to its parameter's."""
    loaded: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []

    def before(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        asked = [{name: group.get(name, DEFAULTS[name]) for name in DEFAULTS} for group in optimizer.param_groups]
        loaded[:] = [(state_dict, asked)]

    def after(optimizer: Optimizer) -> None:
        saved, options = loaded.pop()
        for group, asked in zip(optimizer.param_groups, options, strict=True):
            for name, value in asked.items():
                group.setdefault(name, value)
        ids = [index for group in saved["param_groups"] for index in group["params"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, param in zip(ids, params, strict=True):
            entry = optimizer.state.get(param, {})
            for name, value in saved["state"].get(index, {}).items():
                if isinstance(value, Tensor) and entry[name].dtype != value.dtype and name != "step":
                    entry[name] = value.to(device=param.device, copy=True)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
