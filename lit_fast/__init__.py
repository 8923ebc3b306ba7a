"""A compiled trainer core for PyTorch behind PyTorch Lightning's API.

Importing this package imports nothing else: each name below is fetched from its room when it is first used.

    import lit_fast as L

    class Model(L.LightningModule): ...

    L.Trainer(max_epochs=1).fit(Model(), loader)
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_fast.callbacks.callback import Callback
    from lit_fast.data.datamodule import LightningDataModule
    from lit_fast.module import LightningModule
    from lit_fast.seed import seed_everything
    from lit_fast.trainer import Trainer

__version__ = "0.1.0"

# Where the program has set up no logging of its own, what we report at INFO ("Seed set to 1") is shown.
if not logging.getLogger().hasHandlers():
    _log = logging.getLogger(__name__)
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.INFO)
    _log.propagate = False

_HOME = {
    "Callback": "lit_fast.callbacks.callback",
    "LightningDataModule": "lit_fast.data.datamodule",
    "LightningModule": "lit_fast.module",
    "Trainer": "lit_fast.trainer",
    "seed_everything": "lit_fast.seed",
}
_ROOMS = tuple("callbacks checkpoint compat data demos errors loggers models ops optim pytorch strategies".split())

__all__ = ["Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"lit_fast.{name}")
    else:
        raise AttributeError(f"module 'lit_fast' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
