"""Lightning's flags `_<PACKAGE>_AVAILABLE`: whether a package is installed, asked when the flag is read."""

from __future__ import annotations

from importlib.util import find_spec


def __getattr__(name: str) -> bool:
    if name.startswith("_") and name.endswith("_AVAILABLE"):
        return find_spec(name.removeprefix("_").removesuffix("_AVAILABLE").lower()) is not None
    raise AttributeError(f"lit_fast has no {name} for Lightning's utilities.imports; it has _<PACKAGE>_AVAILABLE")
