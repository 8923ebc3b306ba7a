"""Searches for a learning rate and a batch size, under Lightning's names."""

from __future__ import annotations

from typing import Any

from lit_fast import lazy

__all__ = ["Tuner"]


def __getattr__(name: str) -> Any:
    # Not at once: the callbacks that it starts import this package's searches.
    return lazy.find(__name__, {"Tuner": "tuning"}, name)
