"""`lit-fast watch DIR`: a running job in the terminal, from what its processes have recorded."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lit_fast.errors import ProfileError

if TYPE_CHECKING:
    from rich.console import Console

    from lit_fast.profiler.report.live import Watch


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

    from lit_fast.profiler.report.live import Watch

    console, watch = Console(), Watch(options.folder)
    if options.once:
        console.print(watch.frame(console.width))
        return 0 if watch.ranks else 1
    with suppress(KeyboardInterrupt):
        (_live if console.is_terminal else _lines)(console, watch, options.every)
    return 0


def _live(console: Console, watch: Watch, every: float) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while not watch.over:
            try:
                live.update(watch.frame(console.width), refresh=True)
            except ProfileError as error:  # no file yet: the run may only be about to begin
                live.update(str(error), refresh=True)
            time.sleep(0.0 if watch.over else every)


def _lines(console: Console, watch: Watch, every: float) -> None:
    """Into a file or a pipe: a line where something has changed, and all of it at the end."""
    said = ""
    while not watch.over:
        try:
            watch.look()
            now = str(watch.headline()) if watch.ranks else "\n".join(watch.problems.values())
        except ProfileError as error:
            now = str(error)
        if now != said:
            print(now, flush=True)
            said = now
        time.sleep(0.0 if watch.over else every)
    console.print(watch.frame(console.width))
