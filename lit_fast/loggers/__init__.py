"""Loggers, under Lightning's names. Each is imported when it is first used."""

from __future__ import annotations

from typing import Any

from lit_fast import lazy

_HOME = {
    "CSVLogger": "csv_logs",
    "DummyLogger": "logger",
    "Logger": "logger",
    "TensorBoardLogger": "tensorboard",
    "default_logger": "default",
}

_NOT_BUILT = ("CometLogger", "LitLogger", "MLFlowLogger", "NeptuneLogger", "WandbLogger")

__all__ = ["CSVLogger", "DummyLogger", "Logger", "TensorBoardLogger", "default_logger"]


def __getattr__(name: str) -> Any:
    if name in _NOT_BUILT:
        from lit_fast import not_built

        return getattr(not_built, name)
    return lazy.find(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
