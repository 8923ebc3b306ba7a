"""Modules and data modules built anew from the hyperparameters in a checkpoint."""

from __future__ import annotations

import ast
import csv
import inspect
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lit_fast.checkpoint import io
from lit_fast.errors import CheckpointError, MisconfigurationException
from lit_fast.hparams import AttributeDict, as_given

if TYPE_CHECKING:
    from lit_fast.module import LightningModule

Owner = TypeVar("Owner")

OURS = "lit_fast"  # the key of a checkpoint under which we keep what Lightning's files do not have
PICKLED = "pickled_hyper_parameters"  # ... and in there, hyperparameters that are no plain data

_OF_THE_CLI = ("_instantiator", "_class_path")  # how Lightning's command line would build it; never followed


def load_module(
    cls: type[Owner],
    path: Any,
    map_location: Any,
    hparams_file: Any,
    strict: bool | None,
    weights_only: bool | None,
    overrides: dict[str, Any],
) -> Owner:
    """A module built from a checkpoint, with its weights, on the device that they were loaded to.

    Raises:
        CheckpointError: as `io.load`; the weights are of another model; the class needs more arguments.
        MisconfigurationException: `strict` contradicts the module's `strict_loading`, or `hparams_file` is unreadable.
    """
    checkpoint = io.load(path, map_location or where_it_was, weights_only is not False)
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} holds no model ('state_dict' is missing); pass a checkpoint of a Trainer's.")
    module: Any = build(cls, checkpoint, path, hparams_file, overrides, trusted=weights_only is False)
    chosen = module.__dict__.get("_strict_loading")
    if strict is not None and chosen is not None and strict != chosen:
        raise MisconfigurationException(
            f"load_from_checkpoint(strict={strict}) contradicts {cls.__name__}.strict_loading={chosen}; "
            f"set one of them."
        )
    strict = module.strict_loading if strict is None else strict
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    load_weights(module, checkpoint["state_dict"], path, bool(strict))
    device = next((t.device for t in checkpoint["state_dict"].values() if isinstance(t, torch.Tensor)), None)
    placed: Owner = module if device is None else module.to(device)
    return placed


def load_weights(module: LightningModule, weights: Mapping[str, Any], path: Any, strict: bool) -> None:
    """`load_state_dict` after `check_weights`."""
    check_weights(module, weights, path, strict)
    module.load_state_dict(weights, strict=strict)


def check_weights(module: LightningModule, weights: Mapping[str, Any], path: Any, strict: bool) -> None:
    """An error that a person can act on where weights do not fit; what does not match is named where it is allowed.

    Raises:
        CheckpointError: shapes differ, or keys do and `strict` is set.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own.keys() & weights.keys()
        if isinstance(own[name], torch.Tensor) and weights[name].shape != own[name].shape
    ]
    problems = [] if not shapes else [f"{len(shapes)} shapes differ ({sorted(shapes)[0]})"]
    keys = []
    if missing:
        keys.append(f"{len(missing)} keys are missing in the file ({_some(missing)})")
    if unexpected:
        keys.append(f"{len(unexpected)} keys are unknown to the model ({_some(unexpected)})")
    if strict:
        problems += keys
    if problems:
        raise CheckpointError(
            f"{path} is of another model than {type(module).__name__}: {'; '.join(problems)}. Build the model with the "
            f"options it was saved with, or set strict_loading = False to load what fits."
        )
    if keys:
        warnings.warn(f"{path} is loaded into {type(module).__name__} in part: {'; '.join(keys)}.", stacklevel=3)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def build(
    cls: type[Owner],
    checkpoint: dict[str, Any],
    path: Any,
    hparams_file: Any,
    overrides: dict[str, Any],
    trusted: bool = False,
) -> Owner:
    """An instance of `cls`, made from the hyperparameters in a checkpoint, or in a file, and from `overrides`.

    Args:
        trusted: take also those that were pickled, which executes whatever code they hold.

    Raises:
        CheckpointError: the class needs arguments that are not there.
        MisconfigurationException: the file cannot be read.
    """
    described: Any = cls
    kept = checkpoint.get(described.CHECKPOINT_HYPER_PARAMS_KEY, {}) if hparams_file is None else read(hparams_file)
    hparams = as_given(kept if type(kept) is dict else dict(kept))
    if hparams_file is None:
        apart = checkpoint.get(OURS, {}).get(PICKLED, {}).get(described.CHECKPOINT_HYPER_PARAMS_KEY, {})
        hparams.update(_unpickled({k: v for k, v in apart.items() if k not in overrides}, cls, path, trusted))
    for name in _OF_THE_CLI:
        hparams.pop(name, None)
    hparams.update(overrides)
    parameters = inspect.signature(described.__init__).parameters.values()
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    container = checkpoint.get(described.CHECKPOINT_HYPER_PARAMS_NAME)
    if container in accepted:  # save_hyperparameters was given one dictionary: the argument of this name
        hparams = {container: AttributeDict(hparams), **overrides}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        hparams = {name: value for name, value in hparams.items() if name in accepted}
    try:
        return cls(**hparams)
    except TypeError as error:
        raise CheckpointError(
            f"{cls.__name__} cannot be built from {path}, which holds the hyperparameters "
            f"{', '.join(hparams) or 'none'}: {error}. Call save_hyperparameters() in its __init__, or pass what is "
            f"missing: load_from_checkpoint(path, name=value)."
        ) from error


def _unpickled(apart: dict[str, torch.Tensor], cls: type, path: Any, trusted: bool) -> dict[str, Any]:
    if not trusted:
        if apart:
            warnings.warn(
                f"{cls.__name__} is built without the hyperparameters {', '.join(apart)}, which {path} holds as "
                f"pickled code. Pass them, load_from_checkpoint(path, {next(iter(apart))}=...), or "
                f"weights_only=False if you trust the file.",
                stacklevel=5,
            )
        return {}
    values: dict[str, Any] = {}
    for name, data in apart.items():
        try:
            values[name] = pickle.loads(bytes(data.tolist()))
        except Exception as error:
            raise CheckpointError(
                f"{path}: the hyperparameter {name!r} cannot be unpickled ({error}). Pass it: "
                f"load_from_checkpoint(path, {name}=...)."
            ) from error
    return values


def read(path: Any) -> dict[str, Any]:
    """Hyperparameters from a .yaml file, or from a .csv file of lines `key,value` below a heading.

    Raises:
        MisconfigurationException: there is no such file, or it is of another kind.
    """
    file = Path(path)
    if file.suffix.lower() not in (".csv", ".yml", ".yaml"):
        raise MisconfigurationException(f"hparams_file={str(path)!r}: allowed are files named .yaml, .yml or .csv.")
    if not file.exists():
        raise MisconfigurationException(f"hparams_file={str(path)!r}: there is no such file.")
    if file.suffix.lower() == ".csv":
        with file.open(newline="") as lines:
            return {row[0]: _literal(row[1]) for row in list(csv.reader(lines))[1:] if row}
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MisconfigurationException(f"hparams_file={str(path)!r} needs PyYAML: pip install pyyaml.") from error
    return dict(yaml.safe_load(file.read_text("utf-8")) or {})


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def where_it_was(storage: Any, location: str) -> Any:
    """The default `map_location`: each tensor on the device that it was saved from, or the CPU where there is none."""
    kind = location.partition(":")[0]
    absent = (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    )
    return storage.cpu() if absent or kind == "xla" else None
