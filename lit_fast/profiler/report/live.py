"""A running job in the terminal, from the files that its processes write every few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lit_fast.errors import ProfileError
from lit_fast.profiler import merge
from lit_fast.profiler.record import PHASES, Profile, RankSummary, read
from lit_fast.profiler.report.units import count, digits, rate, seconds, share

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 12  # ranks
BAR = 24
# Three times what a process takes between two files by default, and some: it may be gone.
OLD = 20.0


@dataclass
class Seen:
    """What was last read of one process."""

    summary: RankSummary
    written: float  # s since 1970, by the file's own time
    world_size: int
    before: RankSummary | None = None  # the one before: the difference is what happens now

    @property
    def steps(self) -> int:
        return self.summary.steps - (self.before.steps if self.before is not None else 0)

    @property
    def wall(self) -> float:
        start = self.before.wall if self.before is not None else self.summary.phases.get("setup", 0.0)
        return self.summary.wall - start

    def phase(self, name: str) -> float:
        """s a step, between the last two files; since the beginning where there is only one."""
        earlier = self.before.phases.get(name, 0.0) if self.before is not None else 0.0
        return (self.summary.phases.get(name, 0.0) - earlier) / max(1, self.steps)

    @property
    def own_work(self) -> float:
        """s a step without waiting, as `merge.own_work`."""
        return self.wall / max(1, self.steps) - sum(map(self.phase, ("communication", "idle", "checkpoint", "logging")))


class Watch:
    """Looks at a folder again and again; of thousands of files it reads those that have changed.

    Example::

        watch = Watch("lit_fast_profile")
        rich.print(watch.frame())
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[Path, Seen] = {}
        self.problems: dict[Path, str] = {}

    def look(self) -> None:
        """Read what is new.

        Raises:
            ProfileError: there is no file at all.
        """
        for path in merge.rank_files(self.folder):
            try:
                written = path.stat().st_mtime
                if path in self.seen and self.seen[path].written == written:
                    continue
                profile = read(path, merge.BULKY)
            except (ProfileError, OSError) as error:
                self.problems[path] = str(error)
                continue
            self.problems.pop(path, None)
            if isinstance(profile, Profile):
                self._note(path, merge.summarize(profile), written, profile.header.world_size)

    def _note(self, path: Path, summary: RankSummary, written: float, world_size: int) -> None:
        last = self.seen.get(path)
        # Fewer steps than before: another run has begun. As many: nothing to tell a rate by.
        goes_on = last is not None and 0 < last.summary.steps < summary.steps
        self.seen[path] = Seen(summary, written, world_size, last.summary if goes_on and last is not None else None)

    @property
    def over(self) -> bool:
        """Whether every process has written its last file."""
        ended = [one.summary.finished or one.summary.ended_by is not None for one in self.seen.values()]
        return bool(ended) and all(ended) and len(ended) >= max(one.world_size for one in self.seen.values())

    def frame(self) -> RenderableType:
        """What there is to see now."""
        from rich.console import Group
        from rich.text import Text

        self.look()
        now = time.time()
        ranks = sorted(self.seen.values(), key=lambda one: -one.own_work)
        lines = [Text(f"{problem}", "yellow") for problem in list(self.problems.values())[:3]]
        if not ranks:
            return Group(*lines)
        return Group(_headline(ranks, now), Text(""), _phases(ranks), Text(""), _ranks(ranks, now), *lines)


def _headline(ranks: Sequence[Seen], now: float) -> RenderableType:
    from rich.text import Text

    world = max(one.world_size for one in ranks)
    speeds = [one.steps / one.wall for one in ranks if one.wall > 0.0]
    text = Text.assemble((f"{len(ranks):,} of {count(world, 'rank')}", "bold"), "  ")
    text.append(f"step {max(one.summary.steps for one in ranks):,}", "bold")
    text.append(f"  {rate(median(speeds), 'steps/s')}" if speeds else "")
    running = [one for one in ranks if not one.summary.finished and not one.summary.ended_by]
    if not running:
        text.append("  ended")
    elif (age := now - min(one.written for one in running)) > OLD:
        silent = min(running, key=lambda one: one.written)
        text.append(f"  rank {silent.summary.rank} has not written for {seconds(age)}", "bold red")
    return text


def _phases(ranks: Sequence[Seen]) -> RenderableType:
    """By the median rank, a step."""
    from rich.table import Table
    from rich.text import Text

    spent = {name: median([one.phase(name) for one in ranks]) for name in PHASES if name not in ("setup", "profiling")}
    total = sum(spent.values())
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    for name, s in spent.items():
        if s > 0.0:
            bar = "#" * round(BAR * s / total)
            table.add_row(Text(name), seconds(s), share(s / total), bar)
    return table


def _ranks(ranks: Sequence[Seen], now: float) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("host")
    for name in ("step", "ms a step", "own work", "waits", "written"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for one in ranks[:SHOWN]:
        summary, age = one.summary, max(0.0, now - one.written)
        state = summary.ended_by or ("ended" if summary.finished else "")
        figures = (one.wall / max(1, one.steps), one.own_work, one.phase("communication"))
        old = "bold red" if age > OLD and not state else ""
        table.add_row(
            str(summary.rank), Text(summary.host), f"{summary.steps:,}", *(digits(1e3 * s) for s in figures),
            Text(f"{age:.0f} s ago", old), Text(state),
        )  # fmt: skip
    if len(ranks) > SHOWN:
        table.add_row("", Text(f"{len(ranks) - SHOWN:,} with less work"))
    return table
