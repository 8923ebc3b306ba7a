"""The importer that follows the table of Lightning's names (table.py)."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lit_fast.pytorch.table import TABLE

LIGHTNING_VERSION = "2.6.6"


def children(key: str) -> list[str]:
    """The last parts of the module names right below `key`."""
    below = f"{key}." if key else ""
    found = {k[len(below) :].split(".")[0] for k in TABLE if k.startswith(below) and k != key}
    ours = target(key)
    if isinstance(ours, str) and key != "pytorch":
        package = importlib.import_module(ours)
        found |= {m.name for m in pkgutil.iter_modules(getattr(package, "__path__", [])) if m.name[0] != "_"}
    return sorted(found)


def target(key: str) -> str | dict[str, str] | None:
    """The table's entry for `key`, or the submodule of ours that an entry above it leads to."""
    if key in TABLE:
        return TABLE[key]
    above, _, last = key.rpartition(".")
    package = target(above) if above else None
    return f"{package}.{last}" if isinstance(package, str) and above != "pytorch" else None


def exists(key: str) -> bool:
    """Whether `key` leads to a module; imports the packages above it at most."""
    found = target(key)
    if isinstance(found, str):
        try:
            return importlib.util.find_spec(found) is not None
        except ModuleNotFoundError:
            return False
    return found is not None


class Gathered(ModuleType):
    """A module of single names, each fetched when it is first used."""

    def __init__(self, key: str, table: dict[str, str]) -> None:
        name = f"lightning.{key}".rstrip(".")
        super().__init__(name, f"Names of lit_fast, as {name} has them.")
        self.__path__: list[str] = []  # a package to the import system, with nothing on disk
        self.__all__ = sorted(table)
        self.__version__ = LIGHTNING_VERSION
        self._key = key
        self._table = table

    def __getattr__(self, name: str) -> Any:
        if name in self._table:
            home, _, attribute = self._table[name].partition(":")
            value = getattr(importlib.import_module(home), attribute)
        elif name in children(self._key):
            value = load(f"{self._key}.{name}".lstrip("."))
        else:
            known = ", ".join([*self.__all__, *children(self._key)])
            raise AttributeError(f"lit_fast has no {self.__name__}.{name} yet; it has {known}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__all__, *children(self._key)})


# Those of lit_fast.pytorch itself.
_OWN_FILES = ("apply", "arguments", "functions", "names", "requirements", "table", "types")

_gathered: dict[str, Gathered] = {}


def load(key: str) -> ModuleType:
    """The module that stands at `key`: one of ours, or the gathered one, always the same object."""
    found = target(key)
    if isinstance(found, str):
        module = importlib.import_module(found)
        for child, entry in TABLE.items():  # what it does not have itself: loggers.wandb
            above, _, name = child.rpartition(".")
            if above == key != "pytorch" and isinstance(entry, dict) and name not in vars(module):
                setattr(module, name, load(child))
        return module
    if found is None:
        raise ModuleNotFoundError(f"lit_fast has no lightning.{key} yet", name=key)
    if key not in _gathered:
        _gathered[key] = Gathered(key, found)
    return _gathered[key]


class _Existing(importlib.abc.Loader):
    """Puts an existing module under a second name and leaves it as it was."""

    def __init__(self, key: str) -> None:
        self.key = key

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = load(self.key)
        self.kept = getattr(module, "__spec__", None)  # the import system overwrites it with the second name's
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self.kept is not None:
            module.__spec__ = self.kept


class Finder(importlib.abc.MetaPathFinder):
    """Serves the names below the roots it was given; stands first, since PathFinder would load copies."""

    def __init__(self) -> None:
        self.roots: dict[str, str] = {}

    def serve(self, root: str, key: str) -> None:
        """Lets `root` and everything below it lead to `key` of the table."""
        self.roots[root] = key
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def withdraw(self, root: str) -> None:
        self.roots.pop(root, None)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for root, key in self.roots.items():
            if fullname != root and not fullname.startswith(f"{root}."):
                continue
            rest = fullname[len(root) + 1 :]
            if root == "lit_fast.pytorch" and (not rest or rest in _OWN_FILES):
                return None  # these are files of this very package
            asked = ".".join(part for part in (key, rest) if part)
            if not exists(asked):
                raise ModuleNotFoundError(
                    f"lit_fast stands in for {root} here and has no {fullname} yet; "
                    f"{fullname.rpartition('.')[0]} has {', '.join(children(asked.rpartition('.')[0]))}",
                    name=fullname,
                )
            # Not marked as a package, or a plain module would be given an empty __path__.
            return ModuleSpec(fullname, _Existing(asked))
        return None


FINDER = Finder()
