"""The Trainer's options, resolved and checked once; every rule between two options stands here."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.precision import Precision, resolve_precision
from lit_fast.states import GradClipAlgorithmType


@dataclass(frozen=True)
class TrainerConfig:
    """What one Trainer was asked for, with every default filled in."""

    device: torch.device
    precision: Precision
    max_epochs: int
    max_steps: int
    min_epochs: int | None
    min_steps: int | None
    limit_train_batches: int | float
    limit_val_batches: int | float
    val_check_interval: int | float
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int
    log_every_n_steps: int
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: GradClipAlgorithmType | None
    inference_mode: bool
    profiler: Any
    default_root_dir: Path
    enable_autolog_hparams: bool
    keep_freed_memory: bool
    max_epochs_given: bool = field(default=True)


# Options of Lightning's Trainer that are accepted by name and not built yet: name -> the value that asks for nothing.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "strategy": ("auto", "single_device"),
    "num_nodes": (1,),
    "fast_dev_run": (False, 0),
    "max_time": (None,),
    "limit_test_batches": (None, 1.0),
    "limit_predict_batches": (None, 1.0),
    "overfit_batches": (0.0, 0),
    "deterministic": (None, False),
    "benchmark": (None,),
    "use_distributed_sampler": (True, False),  # one process: nothing to distribute
    "detect_anomaly": (False,),
    "barebones": (False,),
    "plugins": (None, []),
    "sync_batchnorm": (False,),
    "reload_dataloaders_every_n_epochs": (0,),
    "model_registry": (None,),
    "suggest_integrations": (True, False),  # there is nothing that we suggest
}


def refuse_unknown(unknown: list[str], known: list[str]) -> NoReturn:
    """Raises: MisconfigurationException, which names the options that the caller may have meant."""
    close = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(sorted(known))}."
    raise MisconfigurationException(f"Trainer has no option {unknown[0]!r}; {hint}")


def resolve_config(**given: Any) -> TrainerConfig:
    """Fill in defaults, check every option and every pair of options.

    Raises:
        MisconfigurationException: an option is unknown, out of range, contradicts another, or is not built yet.
    """
    for name, allowed in NOT_YET.items():
        value = given.pop(name)
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
            raise MisconfigurationException(
                f"Trainer({name}={value!r}) is not built yet; allowed so far: "
                f"{' or '.join(repr(choice) for choice in allowed)}. Leave the option out to go on."
            )
    steps, epochs = given["max_steps"], given["max_epochs"]
    _check_count("max_steps", steps, minimum=-1)
    if epochs is not None:
        _check_count("max_epochs", epochs, minimum=-1)
    for name in ("min_steps", "min_epochs", "check_val_every_n_epoch"):
        if given[name] is not None:
            _check_count(name, given[name], minimum=1 if name.startswith("check") else 0)
    for name in ("limit_train_batches", "limit_val_batches"):
        given[name] = _check_limit(name, given[name])
    interval = 1.0 if given["val_check_interval"] is None else given["val_check_interval"]
    if isinstance(interval, str | dict) or hasattr(interval, "total_seconds"):
        raise MisconfigurationException(
            f"Trainer(val_check_interval={interval!r}): intervals in time are not built yet; allowed are an int "
            f"(training batches) or a fraction of an epoch in (0.0, 1.0]."
        )
    interval = _check_limit("val_check_interval", interval)
    if interval == 0:
        raise MisconfigurationException(
            "Trainer(val_check_interval=0) would validate never and always; use limit_val_batches=0 to switch "
            "validation off."
        )
    if given["check_val_every_n_epoch"] is None and isinstance(interval, float):
        raise MisconfigurationException(
            f"Trainer(check_val_every_n_epoch=None) counts batches across epochs, so val_check_interval must be an "
            f"int; given was {interval!r}."
        )
    _check_count("accumulate_grad_batches", given["accumulate_grad_batches"], minimum=1)
    log_every = 50 if given["log_every_n_steps"] is None else given["log_every_n_steps"]
    _check_count("log_every_n_steps", log_every, minimum=0)
    sanity = 2 if given["num_sanity_val_steps"] is None else given["num_sanity_val_steps"]
    _check_count("num_sanity_val_steps", sanity, minimum=-1)
    clip = given["gradient_clip_val"]
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float)):
        raise MisconfigurationException(f"Trainer(gradient_clip_val={clip!r}): allowed is a number or None.")
    algorithm = given["gradient_clip_algorithm"]
    algorithm = getattr(algorithm, "value", algorithm)
    if algorithm is not None and str(algorithm).lower() not in ("norm", "value"):
        raise MisconfigurationException(
            f"Trainer(gradient_clip_algorithm={algorithm!r}): allowed are 'norm' and 'value'."
        )
    max_epochs_given = epochs is not None
    if epochs is None:
        epochs = 1000 if steps == -1 else -1
        if given["min_epochs"] and epochs != -1:
            epochs = max(epochs, given["min_epochs"])
    return TrainerConfig(
        device=_resolve_device(given["accelerator"], given["devices"]),
        precision=resolve_precision(given["precision"]),
        max_epochs=epochs,
        max_steps=steps,
        min_epochs=given["min_epochs"],
        min_steps=given["min_steps"],
        limit_train_batches=given["limit_train_batches"],
        limit_val_batches=given["limit_val_batches"],
        val_check_interval=interval,
        check_val_every_n_epoch=given["check_val_every_n_epoch"],
        num_sanity_val_steps=sanity,
        log_every_n_steps=log_every,
        enable_checkpointing=_default_true(given["enable_checkpointing"]),
        enable_progress_bar=_default_true(given["enable_progress_bar"]),
        enable_model_summary=_default_true(given["enable_model_summary"]),
        accumulate_grad_batches=given["accumulate_grad_batches"],
        gradient_clip_val=float(clip) if clip else None,  # 0 switches clipping off, as in Lightning
        gradient_clip_algorithm=None if algorithm is None else GradClipAlgorithmType(str(algorithm).lower()),
        inference_mode=bool(given["inference_mode"]),
        profiler=given["profiler"],
        default_root_dir=Path(os.fspath(given["default_root_dir"] or Path.cwd())).expanduser(),
        enable_autolog_hparams=given["enable_autolog_hparams"],
        keep_freed_memory=bool(given["keep_freed_memory"]),
        max_epochs_given=max_epochs_given,
    )


def batch_limit(name: str, limit: int | float, length: int | None) -> int | None:
    """How many batches of a loader of `length` batches are used; None means until it ends.

    Raises:
        MisconfigurationException: a fraction of a loader without a length, or so small a fraction that nothing is left.
    """
    if length is None:
        if isinstance(limit, int):
            return limit
        if limit == 1.0:
            return None
        if limit == 0.0:
            return 0
        raise MisconfigurationException(
            f"Trainer({name}={limit!r}) is a fraction, but the loader has no length; give a number of batches (int), "
            f"1.0 or 0."
        )
    if isinstance(limit, int):
        return min(limit, length)
    batches = int(length * limit)
    if batches == 0 and limit > 0.0 and length > 0:
        raise MisconfigurationException(
            f"Trainer({name}={limit!r}) of {length} batches is less than one batch; use at least {1 / length:.3g}, "
            f"or an int."
        )
    return batches


def _default_true(value: bool | None) -> bool:
    return True if value is None else bool(value)


def _check_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise MisconfigurationException(
            f"Trainer({name}={value!r}): allowed is an int of at least {minimum}"
            f"{' (-1 for no limit)' if minimum == -1 else ''}."
        )


def _check_limit(name: str, value: Any) -> int | float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MisconfigurationException(
            f"Trainer({name}={value!r}): allowed is an int (batches) or a float (a fraction between 0.0 and 1.0)."
        )
    if isinstance(value, float) and not 0.0 <= value <= 1.0 and not value.is_integer():
        raise MisconfigurationException(
            f"Trainer({name}={value!r}): a fraction lies between 0.0 and 1.0; a number of batches is an int."
        )
    if value < 0:
        raise MisconfigurationException(f"Trainer({name}={value!r}): a limit cannot be negative.")
    return int(value) if isinstance(value, float) and value > 1.0 else value


def _resolve_device(accelerator: Any, devices: Any) -> torch.device:
    index = 0
    count = devices
    if isinstance(devices, list | tuple):
        if len(devices) != 1:
            raise MisconfigurationException(f"Trainer(devices={devices!r}): one device so far; allowed is e.g. [0].")
        index, count = int(devices[0]), 1
    if count not in ("auto", 1, "1", -1, "-1"):
        raise MisconfigurationException(
            f"Trainer(devices={devices!r}): several devices are not built yet; allowed are 1, [index], 'auto'."
        )
    name = str(accelerator).lower()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name in ("gpu", "cuda"):
        if not torch.cuda.is_available():
            raise MisconfigurationException(
                f"Trainer(accelerator={accelerator!r}): this torch ({torch.__version__}) sees no CUDA device; "
                f"use accelerator='cpu' or 'auto', or a CUDA build of torch."
            )
        if index >= torch.cuda.device_count():
            raise MisconfigurationException(
                f"Trainer(devices={devices!r}): there are {torch.cuda.device_count()} CUDA devices (0-based)."
            )
        return torch.device("cuda", index)
    if name == "cpu":
        return torch.device("cpu")
    raise MisconfigurationException(f"Trainer(accelerator={accelerator!r}): allowed are 'auto', 'cpu', 'gpu', 'cuda'.")
