"""`lit-fast watch DIR`: a running job in the terminal, from what its processes have recorded."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from lit_fast.errors import ProfileError


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lit-fast watch",
        description="Shows speed, phases and the slowest ranks of a run that StepProfiler records, until it ends.",
    )
    parser.add_argument("folder", type=Path, help="where its processes write rank-00000.json, ...")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (default 2)")
    parser.add_argument("--once", action="store_true", help="one look, and end")
    options = parser.parse_args(argv)

    from rich.console import Console
    from rich.live import Live

    from lit_fast.profiler.report.live import Watch

    console, watch = Console(), Watch(options.folder)
    if options.once:
        console.print(watch.frame())
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while not watch.over:
                try:
                    live.update(watch.frame(), refresh=True)
                except ProfileError as error:  # no file yet: the run may only be about to begin
                    live.update(str(error), refresh=True)
                time.sleep(0.0 if watch.over else options.every)
    except KeyboardInterrupt:
        pass
    return 0
