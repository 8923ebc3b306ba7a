"""Lightning's names for what lit_fast has: `import lit_fast.pytorch as pl`.

Submodules carry Lightning's names too (`lit_fast.pytorch.callbacks.model_checkpoint`). They are
lit_fast's own modules under a second name, so that each class exists once. The table is in table.py.
"""

from __future__ import annotations

from typing import Any

import lit_fast
from lit_fast.pytorch import names

__all__ = ["Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"]

# The interface that is followed: programs compare it before they use a newer argument.
__version__ = names.LIGHTNING_VERSION

names.FINDER.serve("lit_fast.pytorch", "pytorch")


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(lit_fast, name)
    elif names.exists(f"pytorch.{name}"):
        value = names.load(f"pytorch.{name}")
    else:
        raise AttributeError(f"module 'lit_fast.pytorch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({"__all__", "__version__", *__all__, *names.children("pytorch")})
