"""Searches for a learning rate and a batch size, under Lightning's names."""

from __future__ import annotations

from typing import Any

__all__ = ["Tuner"]


def __getattr__(name: str) -> Any:
    if name != "Tuner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lit_fast.tuner.tuning import Tuner  # the callbacks that it starts import this package's searches

    globals()[name] = Tuner
    return Tuner
