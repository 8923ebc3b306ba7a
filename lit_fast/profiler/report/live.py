"""A running job in the terminal, from the files that its processes write every few seconds."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lit_fast.errors import ProfileError
from lit_fast.profiler import merge, one_run
from lit_fast.profiler.files import read
from lit_fast.profiler.one_run import Stamp
from lit_fast.profiler.record import PHASES, Profile, RankSummary
from lit_fast.profiler.report.units import count, digits, rate, seconds, share

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 12  # ranks
BAR, BESIDE = 24, 36  # columns of the longest bar, and of what stands before it
# Three times what a process takes between two files by default, and some: it may be gone.
OLD = 20.0


@dataclass
class Seen:
    """What was last read of one process."""

    summary: RankSummary
    written: float  # s since 1970, by the file's own time
    stamp: Stamp
    pid: int
    before: RankSummary | None = None  # the one before: the difference is what happens now

    @property
    def ended(self) -> str:
        """How, "" where it goes on. A process of this machine that is silent is asked for: it may have been killed."""
        if self.summary.ended_by or self.summary.finished:
            return self.summary.ended_by or "ended"
        here = self.summary.host == socket.gethostname()
        return "gone" if here and time.time() - self.written > OLD and not _exists(self.pid) else ""

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
        self.ranks: list[Seen] = []  # of the newest run
        self.problems: dict[Path, str] = {}
        self.left_out: list[str] = []

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
                self._note(path, profile, written)
        self.left_out = []
        if self.seen:
            kept, others = one_run.newest({path: one.stamp for path, one in self.seen.items()})
            self.left_out = merge.left_out([self.seen[path].stamp for path in others])
            self.ranks = [self.seen[path] for path in kept]

    def _note(self, path: Path, profile: Profile, written: float) -> None:
        last, summary = self.seen.get(path), merge.summarize(profile)
        # Fewer steps than before: another run has begun. As many: nothing to tell a rate by.
        goes_on = last is not None and 0 < last.summary.steps < summary.steps
        before = last.summary if goes_on and last is not None else None
        self.seen[path] = Seen(summary, written, Stamp.of(profile), profile.header.pid, before)

    @property
    def over(self) -> bool:
        """Whether every process has written its last file, or is gone."""
        return bool(self.ranks) and all(one.ended for one in self.ranks) and not self.missing

    @property
    def missing(self) -> int:
        """Processes that should have written a file and have not."""
        return self.ranks[0].stamp.world_size - len(self.ranks)

    def frame(self, width: int = 80) -> RenderableType:
        """What there is to see now, in so many columns."""
        from rich.console import Group
        from rich.text import Text

        self.look()
        now = time.time()
        ranks = sorted(self.ranks, key=lambda one: -one.own_work)
        lines = [Text(f"{problem}", "yellow") for problem in [*self.left_out, *list(self.problems.values())[:3]]]
        if not ranks:
            return Group(*lines)
        if not any(one.summary.steps for one in ranks):
            return Group(self.headline(), *lines)
        return Group(self.headline(), Text(""), _phases(ranks, width), Text(""), _ranks(ranks, now, width), *lines)

    def headline(self) -> RenderableType:
        """How it stands, in a line."""
        return _headline(self.ranks, time.time())


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _headline(ranks: Sequence[Seen], now: float) -> RenderableType:
    from rich.text import Text

    world = ranks[0].stamp.world_size
    speeds = [one.steps / one.wall for one in ranks if one.wall > 0.0]
    text = Text.assemble((f"{len(ranks):,} of {count(world, 'rank')}", "bold"), "  ")
    text.append(f"step {max(one.summary.steps for one in ranks):,}", "bold")
    text.append(f"  {rate(median(speeds), 'steps/s')}" if speeds else "")
    running = [one for one in ranks if not one.ended]
    gone = [one for one in ranks if one.ended == "gone"]
    if gone:
        text.append(f"  rank {gone[0].summary.rank} is gone: process {gone[0].pid} was killed", "bold red")
    elif not running:
        ended = sorted({one.ended for one in ranks} - {"ended"})
        text.append(f"  ended by {', '.join(ended)}" if ended else "  ended")
    elif (age := now - min(one.written for one in running)) > OLD:
        silent = min(running, key=lambda one: one.written)
        text.append(f"  rank {silent.summary.rank} has not written for {seconds(age)}", "bold red")
    return text


def _phases(ranks: Sequence[Seen], width: int) -> RenderableType:
    """By the median rank, a step."""
    from rich.table import Table
    from rich.text import Text

    spent = {name: median([one.phase(name) for one in ranks]) for name in PHASES if name not in ("setup", "profiling")}
    total = sum(spent.values())
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True, overflow="crop")
    for name, s in spent.items():
        if s > 0.0:
            bar = "#" * round(min(BAR, max(0, width - BESIDE)) * s / total)
            table.add_row(Text(name), seconds(s), share(s / total), bar)
    return table


def _ranks(ranks: Sequence[Seen], now: float, width: int) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    # Below 80 columns the later ones of these go, in this order: a figure cut short tells nothing.
    shown = {"host": width >= 80, "step": width >= 68, "waits": width >= 56, "written": width >= 48}
    heads = [name for name in ("rank", "host", "step", "ms a step", "own work", "waits", "written", "")
             if shown.get(name, True)]  # fmt: skip
    for name in heads:
        table.add_column(name, justify="left" if name in ("host", "") else "right", no_wrap=True)
    for one in ranks[:SHOWN]:
        summary, age = one.summary, max(0.0, now - one.written)
        cells: dict[str, str | Text] = {
            "rank": str(summary.rank),
            "host": Text(summary.host),
            "step": f"{summary.steps:,}",
            "ms a step": digits(1e3 * one.wall / max(1, one.steps)),
            "own work": digits(1e3 * one.own_work),
            "waits": digits(1e3 * one.phase("communication")),
            "written": Text(f"{age:.0f} s ago", "bold red" if age > OLD and not one.ended else ""),
            "": Text(one.ended),
        }
        table.add_row(*(cells[name] for name in heads))
    if len(ranks) <= SHOWN:
        return table
    return Group(table, Text(f"{len(ranks) - SHOWN:,} with less work"))
