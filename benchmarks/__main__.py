"""`python -m benchmarks [NAME ...]`: the quick ones, or those named; `--readme` prints the last results.

A benchmark is a file here with `main(argv) -> int`; the quick ones say `QUICK = True`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import harness, optimizer

_BESIDE = ("harness", "peers", "curves_drawing", "simulated_network", "__init__", "__main__")
_FIRST = ("step_overhead", "pretrain", "optimizer")  # what a reader of the README wants to know
_FOUND = [p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _BESIDE]
NAMES = [*_FIRST, *sorted(set(_FOUND) - {*_FIRST, "curves"}), "curves"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--readme", action="store_true", help="print the last results as a markdown table")
    parser.add_argument("--write", action="store_true", help="with --readme: put the table into README.md")
    options, passed_on = parser.parse_known_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.readme:
        names = options.names or NAMES
        parts = [harness.markdown(names), optimizer.table(harness.latest("optimizer")) if "optimizer" in names else ""]
        table = "\n\n".join(filter(None, parts))
        harness.write_readme(table) if options.write else print(table)
        return 0
    code = 0
    for name in options.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        if options.names or getattr(module, "QUICK", False):
            code = max(code, module.main(passed_on))
            sys.stdout.flush()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
