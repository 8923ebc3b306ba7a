"""Lightning's flags about packages and versions, asked when they are read.

`_<PACKAGE>_AVAILABLE`, `_<PACKAGE>_GREATER_EQUAL_2_6` (and EQUAL, LESS_EQUAL), `_PYTHON_GREATER_EQUAL_3_11_0`.
"""

from __future__ import annotations

import operator
import platform
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from torch.torch_version import TorchVersion

_COMPARED = re.compile(r"_([A-Z]+)_(GREATER_EQUAL|LESS_EQUAL|EQUAL)_(\d+(?:_\d+)*)")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "EQUAL": operator.eq,
    "GREATER_EQUAL": operator.ge,
    "LESS_EQUAL": operator.le,
}
_IS_WINDOWS = platform.system() == "Windows"
_IS_INTERACTIVE = hasattr(sys, "ps1")


def package_available(package_name: str) -> bool:
    """Whether a package, or a module of one, is installed."""
    try:
        return find_spec(package_name) is not None
    except ModuleNotFoundError:
        return False


def module_available(module_path: str) -> bool:
    """The same."""
    return package_available(module_path)


def compare_version(package: str, op: Callable[[Any, Any], bool], version: str, use_base_version: bool = False) -> bool:
    """Whether the installed version of `package` stands to `version` as `op` says; False where it is not installed.

    Args:
        op: `operator.ge`, for example.
        use_base_version: compare without what marks a build or a release candidate (2.6.0a0+cpu is 2.6.0).
    """
    installed = _version(package)
    if installed is None:
        return False
    # The marks of a development version come after the numbers: "2.6.0.dev1", "2.6.0a0+git", "2.6.0+cpu".
    numbers = re.match(r"\d+(\.\d+)*", installed)
    return op(TorchVersion(numbers[0] if use_base_version and numbers else installed), TorchVersion(version))


def _version(package: str) -> str | None:
    """Of a distribution; of a module of that name where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        if not package_available(package):
            return None
    return str(getattr(import_module(package), "__version__", "")) or None


class RequirementCache:
    """Whether a requirement is met, as a truth value; its text says what to install.

    Args:
        requirement: as pip takes it: "torch>=2.6".
        module: what is imported to find out, instead.

    Example:
        >>> bool(RequirementCache("torch")), bool(RequirementCache("torch>=99"))
        (True, False)
    """

    def __init__(self, requirement: str | None = None, module: str | None = None) -> None:
        self.requirement, self.module = requirement, module

    def __bool__(self) -> bool:
        if self.requirement is None:
            return package_available(self.module or "")
        name, comparisons = _parts(self.requirement)
        if _version(name) is None:
            return self.module is not None and package_available(self.module)
        return all(compare_version(name, op, wanted) for op, wanted in comparisons)

    def __str__(self) -> str:
        wanted = self.requirement or self.module
        return f"{wanted!r} is {'met' if self else f'not met; install it: pip install -U {wanted!r}'}"

    __repr__ = __str__


_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def _parts(requirement: str) -> tuple[str, list[tuple[Callable[[Any, Any], bool], str]]]:
    """ "torch[extra]>=2.0,<3" as ("torch", [(ge, "2.0"), (lt, "3")])."""
    name = re.match(r"[\w.-]+", requirement.strip())
    assert name is not None, f"{requirement!r} begins with no package's name"
    found = re.findall(r"(==|!=|>=|<=|>|<)\s*([\w.+!-]+)", requirement)
    return name[0], [(_SIGNS[sign], wanted) for sign, wanted in found]


def __getattr__(name: str) -> bool:
    compared = _COMPARED.fullmatch(name)
    if compared:
        package, how, numbers = compared.groups()
        wanted = numbers.replace("_", ".")
        if package == "PYTHON":
            return _OPERATORS[how](TorchVersion(platform.python_version()), TorchVersion(wanted))
        return compare_version(package.lower(), _OPERATORS[how], wanted, use_base_version=True)
    if name.startswith("_") and name.endswith("_AVAILABLE"):
        return package_available(name.removeprefix("_").removesuffix("_AVAILABLE").lower())
    raise AttributeError(
        f"lit_fast has no {name} for Lightning's utilities.imports; it has _<PACKAGE>_AVAILABLE and "
        f"_<PACKAGE>_GREATER_EQUAL_<VERSION>"
    )
