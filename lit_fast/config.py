"""The Trainer's options, resolved and checked once; every rule between two options stands here."""

from __future__ import annotations

import difflib
import math
import os
from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from lit_fast.accelerators import Accelerator, resolve_accelerator
from lit_fast.errors import MisconfigurationException, MisconfigurationTypeError
from lit_fast.optim.nonfinite import check_nonfinite
from lit_fast.precision import Precision, precision_plugin, resolve_precision
from lit_fast.states import GradClipAlgorithmType

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class TrainerConfig:
    """What one Trainer was asked for, with every default filled in. Written through the Trainer's attributes."""

    accelerator: Accelerator
    devices: list[torch.device]  # of this machine, one a process
    num_nodes: int
    device: torch.device  # of this process
    precision: Precision
    max_epochs: int | None  # None: not given; a fit then settles it
    max_steps: int
    min_epochs: int | None
    min_steps: int | None
    max_time: timedelta | None
    fast_dev_run: int | bool
    barebones: bool
    limit_train_batches: int | float
    limit_val_batches: int | float
    limit_test_batches: int | float
    limit_predict_batches: int | float
    overfit_batches: int | float
    reload_dataloaders_every_n_epochs: int
    val_check_interval: int | float
    val_check_seconds: float | None  # validation by the clock; `val_check_interval` is then not asked
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | float
    log_every_n_steps: int
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    accumulate_grad_batches: int
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: GradClipAlgorithmType | None
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool
    detect_anomaly: bool
    profiler: Any
    default_root_dir: Path
    enable_autolog_hparams: bool
    suggest_integrations: bool
    keep_freed_memory: bool
    grad_dtype: torch.dtype | None  # of 16-bit parameters; None: their own
    nonfinite: str  # gradients that are NaN or infinite, see optim/nonfinite.py


class Option:
    """One option, read and written as an attribute of the Trainer; what is written holds from the next run on.

    Raises:
        MisconfigurationException: a limit that is out of range.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else getattr(trainer.config, self.name)

    def __set__(self, trainer: Any, value: Any) -> None:
        if self.name.startswith("limit_"):
            value = _check_limit(self.name, value)
        trainer.config = replace(trainer.config, **{self.name: value})


# What `barebones` switches off, and the values of each that do not contradict it.
BAREBONES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "enable_checkpointing": ((None, False), False),
    "logger": ((None, False), False),
    "enable_progress_bar": ((None, False), False),
    "log_every_n_steps": ((None, 0), 0),
    "enable_model_summary": ((None, False), False),
    "num_sanity_val_steps": ((None, 0), 0),
    "fast_dev_run": ((False, 0), False),
    "detect_anomaly": ((False,), False),
    "profiler": ((None,), None),
}


def defaults_from_environment(init: Function) -> Function:
    """`Trainer.__init__`, with a default for each argument in the variable PL_TRAINER_<ARGUMENT>, where it is set.

    A value is read as a Python literal (`2`, `True`, `[0]`, `None`) where it is one, else as text.
    """

    @wraps(init)
    def with_defaults(self: Any, **given: Any) -> None:
        found = {}
        for name in init.__kwdefaults__ or ():
            text = os.environ.get(f"PL_TRAINER_{name.upper()}", "")
            if text and name not in given:
                found[name] = _literal(text)
        try:
            init(self, **found, **given)
        except MisconfigurationException as error:
            if not found:
                raise
            variables = ", ".join(f"PL_TRAINER_{name.upper()}={value!r}" for name, value in found.items())
            raise type(error)(f"{error} Options were taken from the environment: {variables}.") from None

    return with_defaults  # type: ignore[return-value]


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def refuse_unknown(unknown: list[str], known: list[str]) -> NoReturn:
    """Raises: MisconfigurationTypeError, which names the options that the caller may have meant."""
    close = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(sorted(known))}."
    raise MisconfigurationTypeError(f"Trainer has no option {unknown[0]!r}; {hint}")


def apply_barebones(given: dict[str, Any]) -> None:
    """Switch off, in `given`, whatever costs time beside the step.

    Raises:
        MisconfigurationException: one of them was asked for.
    """
    for name, (allowed, off) in BAREBONES.items():
        if not any(given[name] is value or given[name] == value for value in allowed):
            raise MisconfigurationException(
                f"Trainer(barebones=True, {name}={given[name]!r}) contradict each other: barebones leaves out "
                f"everything that takes time beside the step. Drop one of them."
            )
        given[name] = off


_LIMITS = (
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
)  # fmt: skip


def resolve_config(**given: Any) -> TrainerConfig:
    """Fill in defaults, check every option and every pair of options.

    Raises:
        MisconfigurationException: an option is unknown, out of range, or contradicts another.
    """
    _check_count("num_nodes", given["num_nodes"], minimum=1)
    if given["model_registry"] is not None:
        raise MisconfigurationException(
            f"Trainer(model_registry={given['model_registry']!r}): uploading to a model registry needs the litmodels "
            f"package, which lit_fast does not drive. Leave it out and upload trainer.checkpoint_callback."
            f"best_model_path after the fit."
        )
    for name in _SWITCHES:
        _check_choice(name, given[name], (True, False))
    _check_choice("deterministic", given["deterministic"], (None, True, False, "warn"))
    _check_choice("benchmark", given["benchmark"], (None, True, False))
    steps, epochs = given["max_steps"], given["max_epochs"]
    _check_count("max_steps", steps, minimum=-1)
    if epochs is not None:
        _check_count("max_epochs", epochs, minimum=-1)
    for name in ("min_steps", "min_epochs", "check_val_every_n_epoch"):
        if given[name] is not None:
            _check_count(name, given[name], minimum=1 if name.startswith("check") else 0)
    for name in _LIMITS:
        given[name] = _check_limit(name, given[name])
    _check_count("reload_dataloaders_every_n_epochs", given["reload_dataloaders_every_n_epochs"], minimum=0)
    interval, seconds = _resolve_interval(given["val_check_interval"], given["check_val_every_n_epoch"])
    _check_count("accumulate_grad_batches", given["accumulate_grad_batches"], minimum=1)
    log_every = 50 if given["log_every_n_steps"] is None else given["log_every_n_steps"]
    _check_count("log_every_n_steps", log_every, minimum=0)
    sanity = 2 if given["num_sanity_val_steps"] is None else given["num_sanity_val_steps"]
    if sanity != float("inf"):
        _check_count("num_sanity_val_steps", sanity, minimum=-1)
    accelerator, devices = resolve_accelerator(given["accelerator"], given["devices"], given["strategy"])
    config = TrainerConfig(
        accelerator=accelerator,
        devices=devices,
        num_nodes=given["num_nodes"],
        device=devices[0],
        precision=resolve_precision(given["precision"], precision_plugin(given["plugins"]), devices[0].type),
        max_epochs=epochs,
        max_steps=steps,
        min_epochs=given["min_epochs"],
        min_steps=given["min_steps"],
        max_time=None if given["max_time"] is None else duration("max_time", given["max_time"]),
        fast_dev_run=_resolve_fast_dev_run(given["fast_dev_run"]),
        barebones=given["barebones"],
        limit_train_batches=given["limit_train_batches"],
        limit_val_batches=given["limit_val_batches"],
        limit_test_batches=given["limit_test_batches"],
        limit_predict_batches=given["limit_predict_batches"],
        overfit_batches=given["overfit_batches"],
        reload_dataloaders_every_n_epochs=given["reload_dataloaders_every_n_epochs"],
        val_check_interval=interval,
        val_check_seconds=seconds,
        check_val_every_n_epoch=given["check_val_every_n_epoch"],
        num_sanity_val_steps=float("inf") if sanity == -1 else sanity,
        log_every_n_steps=log_every,
        enable_checkpointing=_default_true("enable_checkpointing", given["enable_checkpointing"]),
        enable_progress_bar=_default_true("enable_progress_bar", given["enable_progress_bar"]),
        enable_model_summary=_default_true("enable_model_summary", given["enable_model_summary"]),
        accumulate_grad_batches=given["accumulate_grad_batches"],
        gradient_clip_val=_resolve_clip_value(given["gradient_clip_val"]),
        gradient_clip_algorithm=_resolve_clip_algorithm(given["gradient_clip_algorithm"]),
        deterministic=given["deterministic"],
        benchmark=given["benchmark"],
        inference_mode=given["inference_mode"],
        use_distributed_sampler=given["use_distributed_sampler"],
        detect_anomaly=given["detect_anomaly"],
        profiler=given["profiler"],
        default_root_dir=_resolve_root(given["default_root_dir"]),
        enable_autolog_hparams=given["enable_autolog_hparams"],
        suggest_integrations=given["suggest_integrations"],
        keep_freed_memory=given["keep_freed_memory"],
        grad_dtype=_resolve_grad_dtype(given["grad_dtype"]),
        nonfinite=given["nonfinite"],
    )
    _check_nonfinite(config)
    config = _short_run(config) if config.fast_dev_run else config
    if config.overfit_batches:
        config = replace(config, limit_train_batches=config.overfit_batches, limit_val_batches=config.overfit_batches)
    return config


def _short_run(config: TrainerConfig) -> TrainerConfig:
    """`fast_dev_run`: a few batches of everything, once, and nothing left behind."""
    batches = int(config.fast_dev_run)
    return replace(
        config,
        max_epochs=1,
        max_steps=batches,
        limit_train_batches=batches,
        limit_val_batches=batches,
        limit_test_batches=batches,
        limit_predict_batches=batches,
        num_sanity_val_steps=0,
        val_check_interval=1.0,
        val_check_seconds=None,
        check_val_every_n_epoch=1,
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


_SWITCHES = (
    "barebones", "detect_anomaly", "enable_autolog_hparams", "inference_mode", "keep_freed_memory",
    "suggest_integrations", "sync_batchnorm", "use_distributed_sampler",
)  # fmt: skip


def _default_true(name: str, value: bool | None) -> bool:
    _check_choice(name, value, (None, True, False))
    return value is not False


def _resolve_grad_dtype(given: Any) -> torch.dtype | None:
    if given is None:
        return None
    _check_choice("grad_dtype", given, (None, "float32", torch.float32))
    return torch.float32


def _check_nonfinite(config: TrainerConfig) -> None:
    check_nonfinite(config.nonfinite, config.device)
    if config.nonfinite != "propagate" and getattr(config.precision, "scaler", None) is not None:
        raise MisconfigurationException(
            f"Trainer(nonfinite={config.nonfinite!r}, precision={config.precision.precision!r}): the loss scaler of "
            f"this precision skips such steps already, and finds its scale by them. Leave nonfinite out."
        )


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
        raise MisconfigurationException(f"Trainer({name}={value!r}): allowed are {', '.join(map(repr, allowed))}.")


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


def _resolve_interval(given: Any, every_n_epoch: int | None) -> tuple[int | float, float | None]:
    """`val_check_interval` as batches (int) or a part of an epoch (float), or as seconds."""
    if isinstance(given, str | dict | timedelta):
        return 1.0, duration("val_check_interval", given).total_seconds()
    interval = _check_limit("val_check_interval", given)
    if interval == 0:
        raise MisconfigurationException(
            "Trainer(val_check_interval=0) would validate never and always; use limit_val_batches=0 to switch "
            "validation off."
        )
    if every_n_epoch is None and isinstance(given, float):
        raise MisconfigurationException(
            f"Trainer(check_val_every_n_epoch=None) counts batches across epochs, so val_check_interval must be an "
            f"int or a time ('DD:HH:MM:SS', a timedelta, a dict of its arguments); given was {given!r}."
        )
    return interval, None


def duration(name: str, given: str | timedelta | dict[str, Any]) -> timedelta:
    """A length of time as the Trainer takes it.

    Raises:
        MisconfigurationException: it cannot be read.
    """
    try:
        if isinstance(given, str):
            days, hours, minutes, seconds = map(int, given.split(":"))
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if isinstance(given, dict):
            return timedelta(**given)
        if isinstance(given, timedelta):
            return given
    except (TypeError, ValueError):
        pass
    raise MisconfigurationException(
        f"Trainer({name}={given!r}) cannot be read as a time; write 'DD:HH:MM:SS', such as '00:12:00:00', a "
        f"timedelta, or a dict of its arguments, such as {{'hours': 12}}."
    )


def _resolve_fast_dev_run(given: Any) -> int | bool:
    if not isinstance(given, int) or given < 0:
        raise MisconfigurationException(
            f"Trainer(fast_dev_run={given!r}): allowed are True (one batch), False, or a number of batches from 0."
        )
    return bool(given) if given in (0, 1) else given


def _resolve_clip_value(given: Any) -> int | float | None:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
        raise MisconfigurationTypeError(f"Trainer(gradient_clip_val={given!r}): allowed is a number or None.")
    if given is not None and math.isnan(given):
        raise MisconfigurationException(f"Trainer(gradient_clip_val={given}): allowed is a number or None.")
    return given or None  # 0 switches clipping off, as in Lightning


def _resolve_clip_algorithm(given: Any) -> GradClipAlgorithmType | None:
    algorithm = getattr(given, "value", given)
    if algorithm is None:
        return None
    if str(algorithm).lower() not in ("norm", "value"):
        raise MisconfigurationException(
            f"Trainer(gradient_clip_algorithm={algorithm!r}): allowed are 'norm' and 'value'."
        )
    return GradClipAlgorithmType(str(algorithm).lower())


def _resolve_root(given: Any) -> Path:
    try:
        return Path(os.path.normpath(Path(os.fspath(given or Path.cwd())).expanduser()))
    except TypeError:
        raise MisconfigurationTypeError(
            f"Trainer(default_root_dir={given!r}): allowed is a path (text or os.PathLike)."
        ) from None
