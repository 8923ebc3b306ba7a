"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


def find(package: str, home: Mapping[str, str], name: str) -> Any:
    """What `package` has as `name`, kept there from now on; the body of its `__getattr__`.

    Args:
        package: its `__name__`.
        home: for each public name, the submodule that defines it. Submodules are found by their own names.

    Raises:
        AttributeError: there is no such name.
    """
    value: Any
    if name in home:
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
        value = importlib.import_module(f"{package}.{name}")
    else:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    setattr(sys.modules[package], name, value)
    return value
