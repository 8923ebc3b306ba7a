"""Lets programs written for Lightning run on lit_fast without an edit.

    import lit_fast.compat
    lit_fast.compat.install()

    import lightning as L                 # lit_fast
    from pytorch_lightning.callbacks import ModelCheckpoint

What does not exist in lit_fast yet raises ModuleNotFoundError, or ImportError for a single name.
`lit-fast run script.py` does the same for a whole program.
"""

from __future__ import annotations

import importlib
import sys

from lit_fast.errors import MisconfigurationException
from lit_fast.pytorch import names

ROOTS = {"lightning": "", "lightning_fabric": "fabric", "pytorch_lightning": "pytorch"}


def _modules(root: str) -> list[str]:
    return [name for name in sys.modules if name == root or name.startswith(f"{root}.")]


def installed() -> bool:
    """Whether Lightning's names lead to lit_fast now."""
    return all(root in names.FINDER.roots for root in ROOTS)


def install() -> None:
    """Makes `lightning`, `pytorch_lightning` and `lightning_fabric` lead to lit_fast; idempotent.

    Raises:
        MisconfigurationException: Lightning itself has been imported already; classes of both would mix.
    """
    if installed():
        return
    real = [root for root in ROOTS if root in sys.modules]
    if real:
        raise MisconfigurationException(
            f"{' and '.join(real)} had been imported before lit_fast.compat.install(), from "
            f"{getattr(sys.modules[real[0]], '__file__', 'an unknown place')}. Call install() before "
            "anything that imports Lightning, or start the program with `lit-fast run`."
        )
    for root, key in ROOTS.items():
        names.FINDER.serve(root, key)
    # torch imports it (a second or so) when the first optimizer is made, in the middle of a program's `fit`. Where
    # Lightning is imported it has been paid for by then, and programs that time their `fit` expect that.
    importlib.import_module("torch._dynamo")


def uninstall() -> None:
    """Takes the names back, so that Lightning itself (if it is installed) is imported next time."""
    for root in ROOTS:
        if root in names.FINDER.roots:
            names.FINDER.withdraw(root)
            for name in _modules(root):
                del sys.modules[name]
