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
`state_dtype` and `master` are read when a state is made or loaded: to change them later, set them in the param group
and call `optimizer.load_state_dict(optimizer.state_dict())`.

Random bits are a function of (seed, step, element's index among all elements of the optimizer): the same on any number
of threads, and after a resume.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim.codes import CODE_BLOCK, UNSIGNED, decode, encode, rebuilt, split

DEFAULTS: dict[str, Any] = {"state_dtype": None, "master": None, "rounding": "nearest", "seed": 0}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "state_dtype": (None, "float32", "bfloat16", "8bit"),
    "master": (None, "float32", "remainder"),
    "rounding": ("nearest", "stochastic"),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HALF = (torch.bfloat16, torch.float16)
# Moments that codes cannot keep, and why.
_NO_CODES = {
    "square_avg": "RMSprop divides by the root of it, centered by that of its difference to grad_avg squared, which "
    "rounding to codes makes negative",
    "sum": "Adagrad's sum only grows, and what a step adds soon is far less than the distance of two codes",
}
# Those that an option may ask for after steps were taken; without any other a state is not its optimizer's.
_LATE = frozenset(("max_exp_avg_sq", "momentum_buffer", "grad_avg"))
# Stands in the place of a moment whose codes stand beside it. torch's SGD would take none for a buffer not yet begun.
IN_CODES = "in 8-bit codes, which torch.optim cannot read: see lit_fast.optim.to_torch_state_dict"


def storage_options(moments: Sequence[str], **given: Any) -> dict[str, Any]:
    """The options by name, checked; dtypes may be given as torch's.

    Args:
        moments: what the optimizer may keep of a parameter.
        given: options by name.

    Raises:
        MisconfigurationException: a value that is not allowed.
    """
    options = {name: _NAMES.get(v, v) if isinstance(v, torch.dtype) else v for name, v in given.items()}
    for name, value in options.items():
        if name in _ALLOWED and value not in _ALLOWED[name]:
            allowed = ", ".join(map(repr, _ALLOWED[name]))
            raise MisconfigurationException(f"{name}={value!r}: allowed are {allowed}.")
    if not isinstance(options.get("seed", 0), int):
        raise MisconfigurationException(f"seed={options['seed']!r}: it must be an integer.")
    refused = next((name for name in moments if name in _NO_CODES), None)
    if options.get("state_dtype") == "8bit" and refused:
        raise MisconfigurationException(
            f"state_dtype='8bit' with a moment {refused}: {_NO_CODES[refused]}. Take 'bfloat16' or 'float32'."
        )
    return options


def set_options(optimizer: Optimizer, moments: Sequence[str], options: dict[str, Any], override: bool) -> None:
    """Put options into the optimizer's defaults and every param group; a group's own come first unless `override`.

    Raises:
        MisconfigurationException: a value that is not allowed; it names the param group and its parameters.
    """
    options = storage_options(moments, **options)
    optimizer.defaults.update(options)
    for group in optimizer.param_groups:
        for name, value in options.items():
            group[name] = value if override else group.get(name, value)
    check_groups(optimizer.param_groups, moments)


def check_groups(param_groups: list[dict[str, Any]], moments: Sequence[str]) -> None:
    """Check every group's options as `storage_options` does, and write them in their usual form.

    Raises:
        MisconfigurationException: a value that is not allowed; it names the param group and its parameters.
    """
    first = 0
    for number, group in enumerate(param_groups):
        count = len(group["params"])
        try:
            group.update(storage_options(moments, **{name: group[name] for name in DEFAULTS if name in group}))
        except MisconfigurationException as error:
            where = f"param group {number}, parameters {first} to {first + count - 1} of the optimizer"
            raise MisconfigurationException(f"{where}: {error}") from None
        first += count


def asks_for_storage(group: dict[str, Any]) -> bool:
    """Whether the group is kept in a way that torch's own step does not know."""
    return any(group.get(name, default) != default for name, default in DEFAULTS.items() if name != "seed")


def fill(entry: dict[str, Any], group: dict[str, Any], param: Tensor, moments: Iterable[str]) -> None:
    """Add what is missing of a parameter's state: zero moments, the master weight or remainder.

    Raises:
        KernelError: steps are counted, but what they have left behind is missing, or kept in another form.
    """
    kind = group.get("state_dtype")
    for name in moments:
        if entry.get(name) is not None or f"{name}_codes" in entry:
            continue
        step = entry.get("step")
        if name not in _LATE and isinstance(step, Tensor) and step.is_cpu and step.numel() == 1 and step.item() > 0:
            raise KernelError(
                f"The state of a parameter of shape {tuple(param.shape)} has step={step.item():g} and no {name}: it is "
                f"not this optimizer's. Load one that is, or remove the parameter from optimizer.state to begin anew."
            )
        if kind == "8bit":
            storage_options((name,), state_dtype=kind)
            entry[name] = IN_CODES
            entry[f"{name}_codes"] = torch.zeros_like(param, dtype=torch.uint8)
            blocks = -(-param.numel() // CODE_BLOCK)
            entry[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        else:
            entry[name] = torch.zeros_like(param, dtype=_DTYPES.get(str(kind), param.dtype))
    master = group.get("master")
    if param.dtype == torch.float32 or not master or (master if master == "remainder" else "master") in entry:
        return
    if "master" in entry or "remainder" in entry:
        raise KernelError(
            f"The state of a parameter of shape {tuple(param.shape)} keeps its float32 value otherwise than its option "
            f"master={master!r} asks: optimizer.load_state_dict(optimizer.state_dict()) converts it."
        )
    if master == "remainder":
        entry["remainder"] = torch.zeros_like(param, dtype=torch.int16)
    else:
        entry["master"] = param.detach().to(torch.float32)


def needs_steps(group: dict[str, Any]) -> bool:
    """Whether the step's number is asked for even by a formula that does not: random bits depend on it."""
    return group.get("rounding") == "stochastic" or group.get("state_dtype") == "8bit"


# ---- a state in another form ----


@torch.no_grad()
def convert(entry: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
    """Bring a parameter's state into the form that its group asks for.

    Moments in float32 or 16 bits become codes by rounding to nearest; codes become their exact values, rounded to the
    dtype asked for. From float32 masters to remainders, the bfloat16 parameter is written anew, as its upper half.
    What is missing stays so: the next step creates it.
    """
    kind = group.get("state_dtype")
    if param.dtype not in (torch.float32, *_HALF):
        return
    for name in _moments_in(entry):
        codes = entry.get(f"{name}_codes")
        if kind == "8bit" and codes is not None and codes.stride() == param.stride():
            entry[name] = IN_CODES  # which torch's load_state_dict has changed
            continue
        value = _decoded(entry, name)
        if value.shape != param.shape:
            continue  # not this parameter's: the next step says so
        for key in (f"{name}_codes", f"{name}_scale"):
            entry.pop(key, None)
        if kind == "8bit":
            entry[name] = IN_CODES
            laid_out = _like(value, param, torch.float32)
            entry[f"{name}_codes"], entry[f"{name}_scale"] = encode(laid_out, name not in UNSIGNED)
        else:
            entry[name] = _like(value, param, _DTYPES.get(str(kind), param.dtype))
    if needs_steps(group) and entry:
        entry.setdefault("step", torch.zeros((), dtype=torch.float32))
    if isinstance(entry.get("step"), Tensor) and entry["step"].dtype == torch.float64:
        entry["step"] = entry["step"].float()  # as torch counts where float64 is its default dtype
    master = group.get("master") if param.dtype in _HALF else None
    if master == "remainder" and "master" in entry and "remainder" not in entry:
        upper, remainder = split(_like(entry["master"], param, torch.float32))
        param.copy_(upper)
        entry["remainder"] = remainder
    if master == "float32" and "remainder" in entry and "master" not in entry:
        entry["master"] = rebuilt(param, _like(entry["remainder"], param, torch.int16))
    for key, belongs_to in (("master", "float32"), ("remainder", "remainder")):
        if master != belongs_to:
            entry.pop(key, None)
        elif key in entry and entry[key].shape == param.shape:
            entry[key] = _like(entry[key], param, entry[key].dtype)


def to_torch_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict` as torch's class of the same name keeps it: plain moments, no storage options.

    Codes become float32 values, which is exact; masters and remainders are left out: the parameters are their
    roundings. torch casts the moments to their parameters' dtypes when it loads them.

    Example:
        >>> from lit_fast.optim import AdamW
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = AdamW([weight], state_dtype="8bit")
        >>> weight.grad = torch.ones(3)
        >>> optimizer.step()
        >>> theirs = torch.optim.AdamW([weight])
        >>> theirs.load_state_dict(to_torch_state_dict(optimizer))
        >>> theirs.state[weight]["exp_avg"]
        tensor([0.1000, 0.1000, 0.1000])
    """
    saved = optimizer.state_dict()
    saved["param_groups"] = [{k: v for k, v in group.items() if k not in DEFAULTS} for group in saved["param_groups"]]
    for index, entry in saved["state"].items():
        moments = {name: _decoded(entry, name) for name in _moments_in(entry)}
        ours = {"master", "remainder", *(f"{name}_{end}" for name in moments for end in ("codes", "scale"))}
        saved["state"][index] = {k: moments.get(k, v) for k, v in entry.items() if k not in ours}
    return saved


def _moments_in(entry: dict[str, Any]) -> list[str]:
    names = [name for name, value in entry.items() if isinstance(value, Tensor)]
    coded = {name.removesuffix("_codes") for name in names if name.endswith("_codes")}
    beside = {"step", "master", "remainder", *(f"{name}_{end}" for name in coded for end in ("codes", "scale"))}
    return sorted({*names, *coded} - beside)


def _decoded(entry: dict[str, Any], name: str) -> Tensor:
    codes = entry.get(f"{name}_codes")
    if codes is None:
        value: Tensor = entry[name]
        return value
    scale, blocks = entry.get(f"{name}_scale"), -(-codes.numel() // CODE_BLOCK)
    if codes.dtype != torch.uint8 or not isinstance(scale, Tensor) or scale.shape != (blocks,):
        raise KernelError(
            f"{name}_codes of a state are {codes.dtype} of shape {tuple(codes.shape)} and {name}_scale is "
            f"{tuple(scale.shape) if isinstance(scale, Tensor) else scale}: codes are uint8 with one float32 for each "
            f"{CODE_BLOCK} of them. Load a state as lit_fast.optim has saved it."
        )
    return decode(codes, scale, name not in UNSIGNED)


def _like(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in that dtype, on the parameter's device, laid out as it is."""
    if value.dtype == dtype and value.device == param.device and value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=dtype).copy_(value)


# ---- loading ----

_loading: weakref.WeakKeyDictionary[Optimizer, tuple[dict[str, Any], list[dict[str, Any]]]] = (
    weakref.WeakKeyDictionary()
)


def keep_dtypes_on_load(optimizer: Optimizer) -> None:
    """Make `optimizer.load_state_dict` bring what it loads into the form that its param groups ask for.

    torch casts every state to its parameter's dtype. The options of the loaded groups replace the optimizer's, as all
    options do; where they have none (torch saved them), the optimizer's stay.
    """
    if _before_load not in optimizer._optimizer_load_state_dict_pre_hooks.values():
        optimizer.register_load_state_dict_pre_hook(_before_load)
        optimizer.register_load_state_dict_post_hook(_after_load)


def refuse_cast_states(optimizer: Optimizer) -> None:
    """Raises a KernelError: a state that needs `keep_dtypes_on_load` was loaded without, and is cast by now."""
    if _before_load in optimizer._optimizer_load_state_dict_pre_hooks.values():
        return
    for group in filter(asks_for_storage, optimizer.param_groups):
        kept = {"master": torch.float32, "remainder": torch.int16}
        for param in group["params"]:
            entry = optimizer.state.get(param, {})
            moments = dict.fromkeys(_moments_in(entry), _DTYPES.get(str(group.get("state_dtype"))))
            codes = {f"{name}_codes": torch.uint8 for name in moments}
            for name, dtype in {**kept, **moments, **codes}.items():
                if isinstance(entry.get(name), Tensor) and dtype not in (None, entry[name].dtype):
                    raise KernelError(
                        f"The state of a parameter of shape {tuple(param.shape)} has {name} in {entry[name].dtype}, "
                        f"and its storage options ask for {dtype}. torch casts what is loaded before `adopt`: adopt "
                        f"the optimizer first, with the same options, and load the state then."
                    )


def _before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for index, entry in state_dict.get("state", {}).items():
        if not isinstance(entry, dict):
            raise KernelError(f"state_dict['state'][{index!r}] is a {type(entry).__name__}; it must be a dict.")
    asked = [{name: group.get(name, DEFAULTS[name]) for name in DEFAULTS} for group in optimizer.param_groups]
    _loading[optimizer] = (state_dict, asked)


def _after_load(optimizer: Optimizer) -> None:
    saved, options = _loading.pop(optimizer)
    ids = [index for group in saved["param_groups"] for index in group["params"]]
    places = iter(ids)
    for group, asked in zip(optimizer.param_groups, options, strict=True):
        for name, value in asked.items():
            group.setdefault(name, value)
        for param in group["params"]:
            index, entry = next(places), optimizer.state.get(param, {})
            for name, value in saved["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != "step" and entry[name].dtype != value.dtype:
                    entry[name] = value.to(device=param.device, copy=True)
            convert(entry, group, param)


def given_options(options: dict[str, Any]) -> str:
    """The storage options that are not at their defaults, in words."""
    return ", ".join(
        f"{name}={options[name]!r}" for name, usual in DEFAULTS.items() if options.get(name, usual) != usual
    )
