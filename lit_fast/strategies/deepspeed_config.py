"""What DeepSpeed is told: its configuration, from a strategy's options or a program's own, and the Trainer's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from lit_fast.errors import MisconfigurationException

# What the Trainer decides; the value says how to ask it.
_OURS = {
    "gradient_accumulation_steps": "set Trainer(accumulate_grad_batches=...)",
    "optimizer": "return it from configure_optimizers",
    "scheduler": "return it from configure_optimizers",
}
_SECTIONS = {"16": "fp16", "bf16": "bf16"}  # by the first half of a precision's name


def read(given: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """A program's own configuration, a dictionary or the path of a JSON file.

    Raises:
        MisconfigurationException: there is no such file, or it holds something else; a key that the Trainer decides.
    """
    if isinstance(given, Mapping):
        config = copy.deepcopy(dict(given))
    else:
        try:
            with open(given) as file:
                config = json.load(file)
        except (OSError, ValueError, TypeError) as error:
            raise MisconfigurationException(
                f"DeepSpeedStrategy(config={given!r}): allowed are a dictionary and the path of a JSON file ({error})."
            ) from error
    if not isinstance(config, dict):
        raise MisconfigurationException(
            f"DeepSpeedStrategy(config={given!r}): it holds {type(config).__name__}; allowed is a dictionary."
        )
    for key in _OURS.keys() & config.keys():
        raise MisconfigurationException(f"DeepSpeedStrategy(config={{{key!r}: ...}}): leave it out, and {_OURS[key]}.")
    return config


def stage_of(config: Mapping[str, Any]) -> int:
    """How much is in parts: 1, states; 2, gradients too; 3, parameters too.

    Raises:
        MisconfigurationException: nothing is.
    """
    stage = dict(config.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise MisconfigurationException(
            f"DeepSpeedStrategy: its ZeRO stage is {stage!r}; allowed are 1, 2 and 3. Without ZeRO every process holds "
            f"everything: strategy='ddp' does that."
        )
    return int(stage)


def complete(
    config: Mapping[str, Any], precision: str, max_norm: float | None, fp16: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration for a run.

    Args:
        precision: the Trainer's, by its name.
        max_norm: to which norm the Trainer clips gradients; None: it does not.
        fp16: how the loss is scaled in float16, by DeepSpeed's names.

    Raises:
        MisconfigurationException: configuration and Trainer say different things.
    """
    whole = copy.deepcopy(dict(config))
    whole["gradient_accumulation_steps"] = 1  # losses come with their share of a window
    if "train_batch_size" not in whole:
        whole.setdefault("train_micro_batch_size_per_gpu", 1)  # for DeepSpeed's own timers
    clip = whole.setdefault("gradient_clipping", max_norm or 0.0)
    if max_norm and clip != max_norm:
        raise MisconfigurationException(
            f"Trainer(gradient_clip_val={max_norm}) and DeepSpeedStrategy(config={{'gradient_clipping': {clip}}}): "
            f"leave one of them out."
        )
    wanted = _SECTIONS.get(precision.partition("-")[0])
    for section in _SECTIONS.values():
        held = whole.get(section)
        if held and held.get("enabled") not in (None, section == wanted):
            raise MisconfigurationException(
                f"Trainer(precision={precision!r}) and DeepSpeedStrategy(config={{{section!r}: {{'enabled': "
                f"{held['enabled']}}}}}): leave 'enabled' out there, and say it by the Trainer's precision."
            )
    if wanted is not None:
        options = fp16 if wanted == "fp16" else {}
        whole[wanted] = {**options, **(whole.get(wanted) or {}), "enabled": True}
    return whole
