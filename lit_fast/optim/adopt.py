"""A `torch.optim` object, stepped by the compiled core where it can be and by itself where it cannot.

The torch object stays the optimizer: its `param_groups`, `state` and `state_dict` are what is read and
written, anew at every step, so schedulers, checkpoints, added groups and replaced parameters work as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim.adopted import AdoptedOptimizer
from lit_fast.optim.mapping import mapping_of
from lit_fast.optim.scaling import ScaledOptimizer
from lit_fast.optim.storage import DEFAULTS, convert, given_options, refuse_cast_states, set_options


def adopt(
    optimizer: Optimizer,
    max_norm: float | None = None,
    clip_value: float | None = None,
    *,
    norm_type: float = 2.0,
    per_group: bool = False,
    nonfinite: str = "propagate",
    state_dtype: str | torch.dtype | None = None,
    master: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> AdoptedOptimizer:
    """Give a loop the compiled step for its `torch.optim` object.

    Args:
        optimizer: any `torch.optim.Optimizer`. One without a kernel is stepped by its own `step`: see `reason`.
        max_norm: within the step, clip the norm of all gradients to this, as `clip_grad_norm_` does.
        clip_value: within the step, clip gradients to [-clip_value, clip_value], as `clip_grad_value_` does.
        norm_type: which norm `max_norm` limits, named as in `clip_grad_norm_`: a positive number, or infinity. Others
            than 2 are computed by torch, in float64; on a GPU the gradients are then clipped in memory.
        per_group: clip each param group by its own norm, to `max_norm` each; in memory, where it is exceeded.
        nonfinite: what a step does where a gradient is NaN or infinite: "propagate" takes it, as torch does; "skip"
            changes nothing and counts it in `skipped_steps`; "raise" changes nothing and raises. The last two read the
            gradients once more unless they are clipped by norm. On a GPU the device decides and counts, and the error
            comes with a later step; counters of steps are kept there then.
        state_dtype, master, rounding, seed: as in `lit_fast.optim.AdamW`, for every param group; what state there is
            already is converted. Left at their defaults, the param groups stay as they are. With them, call `step` of
            what is returned, never `optimizer.step`, and load a state only after `adopt`: before, torch casts it.
        scaler: has scaled the loss. `step` then does what `scaler.step(optimizer)` does, in one pass with the rest and
            with no host sync: unscale, and leave the step out where a gradient is NaN or infinite. `scaler.update()`
            follows it in the loop, and `scaler.unscale_(optimizer)` may precede it.

    Raises:
        MisconfigurationException: not an optimizer, both clippings at once, a limit or `norm_type` that is not
            positive, `per_group` without `max_norm`, a `nonfinite` or storage option that there is not; a `scaler`
            that is disabled or overrides torch's, or one beside `nonfinite`.
        KernelError: storage options for an optimizer or parameters that the core cannot step; a state with storage
            options that was loaded before.

    Example:
        >>> model = torch.nn.Linear(32, 2)
        >>> adopted = adopt(torch.optim.AdamW(model.parameters()), max_norm=1.0)
        >>> model(torch.ones(4, 32)).sum().backward()
        >>> norm = adopted.step()
        >>> adopted.zero_grad()
        >>> adopted.compiled
        True
    """
    if not isinstance(optimizer, Optimizer):
        raise MisconfigurationException(
            f"adopt got a {type(optimizer).__name__}; it takes a torch.optim.Optimizer. Pass that itself."
        )
    refuse_cast_states(optimizer)
    options = {"state_dtype": state_dtype, "master": master, "rounding": rounding, "seed": seed}
    if options != DEFAULTS:
        _store_as(optimizer, options)
    asked = (optimizer, max_norm, clip_value, norm_type, per_group, nonfinite)
    adopted = AdoptedOptimizer(*asked) if scaler is None else ScaledOptimizer(scaler, *asked)
    if options != DEFAULTS:
        adopted.must_be_compiled()
    return adopted


def _store_as(optimizer: Optimizer, options: dict[str, Any]) -> None:
    mapping, why_not = mapping_of(optimizer)
    if mapping is None:
        raise KernelError(
            f"adopt with storage options ({given_options(options)}): {why_not}, and torch's step knows none."
        )
    set_options(optimizer, mapping.state_keys, options, override=True)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if optimizer.state.get(param):
                convert(optimizer.state[param], group, param)
