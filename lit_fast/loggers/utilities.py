"""What several loggers need: version numbers, metric values, and hyperparameters as plain data."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from lit_fast.errors import MisconfigurationException

_PLAIN = (bool, int, float, str)


def next_version(directory: str) -> int:
    """One more than the largest N of the folders `version_N` in `directory`; 0 where there is none."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return 0
    numbers = [name.split("_")[1] for name in names if name.startswith("version_")]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def params_dict(params: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
    """Hyperparameters as a dictionary, whatever they came as."""
    if params is None:
        return {}
    return dict(vars(params)) if isinstance(params, Namespace) else dict(params)


def add_prefix(metrics: Mapping[str, Any], prefix: str, separator: str) -> Mapping[str, Any]:
    """The same metrics, each name behind `prefix` and `separator`."""
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()} if prefix else metrics


def number(value: Any) -> Any:
    """A 0-dim tensor (or numpy scalar) as a Python number; everything else as it is."""
    return value.item() if hasattr(value, "item") else value


def flatten(params: Mapping[Any, Any], parent: str = "") -> dict[str, Any]:
    """Nested hyperparameters as one level, names joined by "/".

    Example::

        >>> flatten({"net": {"width": 8}, "steps": [{"lr": 1}]})
        {'net/width': 8, 'steps/0/lr': 1}
    """
    flat: dict[str, Any] = {}
    for key, given in params.items():
        name = f"{parent}/{key}" if parent else str(key)
        value = _fields(given)
        if isinstance(value, Mapping):
            flat.update(flatten(value, name))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                flat.update(flatten(item, f"{name}/{i}"))
        else:
            flat[name] = value
    return flat


def primitives(params: Mapping[str, Any]) -> dict[str, Any]:
    """Values that TensorBoard's hparams plugin takes: numbers, booleans, strings; others by their `str`."""
    plain: dict[str, Any] = {}
    for name, value in params.items():
        scalar = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        plain[name] = scalar if isinstance(scalar, _PLAIN) else str(scalar)
    return plain


def to_plain(value: Any) -> Any:
    """A value as data that YAML can hold without naming Python classes; a class or object by its `str`."""
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, Enum):
        return value.name
    value = _fields(value)
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, _PLAIN):  # subclasses, such as numpy's float64
        return next(kind(value) for kind in _PLAIN if isinstance(value, kind))
    return str(value)


def _fields(value: Any) -> Any:
    """A dataclass or namespace as a dictionary; everything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return vars(value) if isinstance(value, Namespace) else value


def write_yaml(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write `values` to a YAML file that any safe loader reads back.

    Raises:
        MisconfigurationException: PyYAML is not installed (an empty mapping needs none).
    """
    text = "{}\n"
    if values:
        try:
            import yaml
        except ImportError as error:
            raise MisconfigurationException(
                f"Writing {os.fspath(path)} needs PyYAML, which is not installed; run: pip install pyyaml"
            ) from error
        text = yaml.safe_dump(to_plain(values), sort_keys=True, allow_unicode=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
