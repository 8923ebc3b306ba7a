"""`lit-fast COMMAND ...`: hands the rest of the command line to the subcommand's own file."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import lit_fast
from lit_fast.errors import LitFastError

# Name, and what --help says. lit_fast/cli/<name>.py is imported when it is called.
COMMANDS = {
    "consolidate": "write a sharded checkpoint, which is a directory, as one file",
    "info": "what was built, what was chosen on this machine, and why",
    "launch": "run a program in several processes, on one machine or several, or as a job of SLURM's",
    "pretrain": "train a GPT on text, by default on the source of Python's standard library",
    "profile": "where a program's fit spends its time, against a loop by hand, Lightning or an earlier run",
    "report": "where the time of a profiled run went, on all its processes",
    "run": "run a Python program written for Lightning, unedited",
    "watch": "a running job's speed, phases and slowest processes, while it is profiled",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lit-fast",
        description="A compiled trainer core for PyTorch behind PyTorch Lightning's API.",
        epilog="\n".join(["commands:", *(f"  {name:<11} {text}" for name, text in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"lit-fast {lit_fast.__version__}")
    top.add_argument("command", choices=list(COMMANDS), metavar="command", help="one of those below")
    top.add_argument("arguments", nargs=argparse.REMAINDER, help="lit-fast COMMAND --help lists them")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for a wrong command line, 1 for an error of lit_fast's own, printed."""
    options = parser().parse_args(argv)
    command = importlib.import_module(f"lit_fast.cli.{options.command}")
    try:
        code: int = command.main(options.arguments)
    except LitFastError as error:
        if options.command == "run":
            raise  # the program's own traceback is worth more than our summary
        print(f"lit-fast {options.command}: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
