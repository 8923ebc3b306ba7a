"""`lit-fast run script.py ...`: runs a program written for Lightning on lit_fast, unedited."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from lit_fast import compat


def main(argv: Sequence[str]) -> int:
    """Runs the program as `python` would; its SystemExit, and so its exit code, goes through."""
    parser = argparse.ArgumentParser(
        prog="lit-fast run",
        usage="lit-fast run [-h] (script.py | -m module) [arguments ...]",
        description="Runs a Python program as `python` would, with every import of lightning, "
        "pytorch_lightning and lightning_fabric leading to lit_fast.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module's name, not a file")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if not options.module and not os.path.isfile(options.program):
        parser.error(f"there is no file {options.program!r}; for a module: lit-fast run -m {options.program}")
    execute(options.program, options.arguments, options.module)
    return 0


def execute(program: str, arguments: Sequence[str], is_module: bool) -> dict[str, Any]:
    """The program in this process, as its main one, with Lightning's names leading here; returns its globals."""
    compat.install()
    sys.argv = [program, *arguments]
    if is_module:
        sys.path.insert(0, os.getcwd())
        return runpy.run_module(program, run_name="__main__", alter_sys=True)
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    return runpy.run_path(program, run_name="__main__")
