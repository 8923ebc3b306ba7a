"""Progress bars."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ProgressBar": "progress_bar",
    "RichProgressBar": "rich_progress",
    "TQDMProgressBar": "tqdm_progress",
}

__all__ = ["ProgressBar", "RichProgressBar", "TQDMProgressBar"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
