"""`lit-fast run script.py ...`: runs a program written for Lightning on lit_fast, unedited."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

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
    compat.install()
    sys.argv = [options.program, *options.arguments]
    if options.module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(options.program)))
        runpy.run_path(options.program, run_name="__main__")
    return 0
