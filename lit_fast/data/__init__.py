"""Data: where a run is in it (`position`), its way to the device (`transfer`), and `LightningDataModule`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_fast.data.combined import CombinedLoader as CombinedLoader
    from lit_fast.data.datamodule import LightningDataModule as LightningDataModule
    from lit_fast.data.position import DataPosition as DataPosition
    from lit_fast.data.transfer import PrefetchToDevice as PrefetchToDevice
    from lit_fast.data.transfer import move as move

_HOMES = {
    "CombinedLoader": "lit_fast.data.combined",
    "DataPosition": "lit_fast.data.position",
    "LightningDataModule": "lit_fast.data.datamodule",
    "PrefetchToDevice": "lit_fast.data.transfer",
    "move": "lit_fast.data.transfer",
}

__all__ = ["CombinedLoader", "DataPosition", "LightningDataModule", "PrefetchToDevice", "move"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
