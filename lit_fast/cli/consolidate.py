"""`lit-fast consolidate DIRECTORY`: one file of a sharded checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from lit_fast.errors import CheckpointError


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="lit-fast consolidate",
        description="Write a sharded checkpoint, which is a directory, as one file that every strategy loads, and "
        "Lightning. It is read whole into the CPU's memory.",
    )
    described.add_argument("checkpoint_folder", help="the directory")
    described.add_argument(
        "--output-file", "--output_file", help="where to write; DIRECTORY.consolidated when left out"
    )
    return described


def main(argv: Sequence[str]) -> int:
    from lit_fast.checkpoint import sharded

    options = parser().parse_args(argv)
    folder = options.checkpoint_folder.rstrip("/")
    output = options.output_file or f"{folder}.consolidated"
    if os.path.lexists(output):
        raise CheckpointError(f"{output!r} is there already; remove it, or name another file with --output-file.")
    sharded.consolidate(folder, output)
    print(f"wrote {output} ({os.path.getsize(output) / 1e6:.1f} MB)")
    return 0
