"""Progress bars."""

from __future__ import annotations

from typing import Any

from lit_fast import lazy

_HOME = {
    "ProgressBar": "progress_bar",
    "RichProgressBar": "rich_progress",
    "TQDMProgressBar": "tqdm_progress",
}

__all__ = ["ProgressBar", "RichProgressBar", "TQDMProgressBar"]


def __getattr__(name: str) -> Any:
    return lazy.find(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
