"""Loggers, under Lightning's names. Each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CSVLogger": "csv_logs",
    "DummyLogger": "logger",
    "Logger": "logger",
    "TensorBoardLogger": "tensorboard",
    "default_logger": "default",
}

_NOT_BUILT = ("CometLogger", "LitLogger", "MLFlowLogger", "WandbLogger")

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger", "default_logger"]


def __getattr__(name: str) -> Any:
    if name in _NOT_BUILT:
        from lit_fast import not_built

        return getattr(not_built, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
