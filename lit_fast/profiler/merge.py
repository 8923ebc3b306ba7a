"""One report of what all processes of a run have written, however many they were.

Files are read twice: first all, one after another, of each only what every process is told of (`RankSummary`); then
those of the few whose whole profile a report keeps. So memory does not grow with the length of the profiles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lit_fast.errors import ProfileError
from lit_fast.profiler import files, one_run, record
from lit_fast.profiler.one_run import Stamp
from lit_fast.profiler.record import Profile, RankSummary, Report

WHOLE = 8  # processes whose profiles are all kept; of more, EXTREMES of either end and rank 0
EXTREMES = 3
# Left out when a file is read for its summary: they make up most of it.
BULKY = ("timeline", "kernels", "parts", "slowest", "syncs")
RANK_FILE = re.compile(r"rank-(\d+)\.json")


def path_of(folder: str | os.PathLike[str], rank: int) -> Path:
    """The file that the process of that rank writes."""
    return Path(folder) / f"rank-{rank:05d}.json"


def merge(folder: str | os.PathLike[str]) -> Report:
    """The report of a folder with files `rank-00000.json`, ...; findings are not made yet.

    A comparison that `lit-fast profile` has written there, in `report.json`, of the same run, stays in it.

    A file that is damaged, foreign, of another version, or of an earlier run is left out, and `problems` says which and
    why; ranks that should be there and are not are in `missing`.

    Raises:
        ProfileError: there is no such folder, or no profile in it can be read.

    Example::

        report = merge("lit_fast_profile")
        print(len(report.ranks), "of", report.profiles[0].header.world_size)
    """
    folder = Path(folder)
    summaries: dict[Path, RankSummary] = {}
    stamps: dict[Path, Stamp] = {}
    doubted: dict[Path, list[str]] = {}
    problems: list[str] = []
    for path in rank_files(folder):
        try:
            profile = _profile(path, without=BULKY)
        except ProfileError as error:
            problems.append(str(error))
            continue
        summaries[path], stamps[path], doubted[path] = summarize(profile), Stamp.of(profile), doubts(profile)
    if not summaries:
        raise ProfileError("\n".join([f"{folder} has no profile that can be read.", *problems]))
    of_run, others = one_run.newest(stamps)
    problems += [doubt for path in of_run for doubt in doubted[path]]
    problems += left_out([stamps[path] for path in others])
    world = stamps[of_run[0]].world_size
    summaries = {path: summaries[path] for path in of_run}
    kept = [_profile(path) for path in kept_whole(summaries)]
    ranks = sorted(summaries.values(), key=lambda summary: summary.rank)
    profiles = sorted(kept, key=lambda profile: profile.header.rank)
    return Report(
        profiles=profiles,
        comparison=_comparison_of(profiles[0], folder / "report.json"),
        ranks=ranks,
        missing=sorted(set(range(world)) - {summary.rank for summary in ranks}),
        problems=problems,
    )


def _comparison_of(profile: Profile, path: Path) -> record.Comparison | None:
    """What that report compares, if it is of the same run."""
    try:
        report = files.read(path)
    except ProfileError:
        return None
    if not isinstance(report, Report) or not report.profiles:
        return None
    of, now = report.profiles[0].header, profile.header
    same = (of.started, of.host, of.pid, of.rank) == (now.started, now.host, now.pid, now.rank)
    return report.comparison if same else None


def of_profiles(profiles: Sequence[Profile]) -> Report:
    """The report of profiles that are in memory already: those of a run that has just ended."""
    problems = [doubt for profile in profiles for doubt in doubts(profile)]
    return Report(profiles=list(profiles), ranks=[summarize(profile) for profile in profiles], problems=problems)


def rank_files(folder: Path) -> list[Path]:
    """Those of a folder, by rank.

    Raises:
        ProfileError: the folder is not there, or has none.
    """
    try:
        paths = [path for path in folder.iterdir() if RANK_FILE.fullmatch(path.name)]
    except OSError as error:
        raise ProfileError(f"{folder} cannot be read: {error.strerror}. A folder of profiles is wanted.") from error
    if not paths:
        raise ProfileError(
            f"{folder} has no rank-*.json: StepProfiler(dirpath=...) writes them while a run goes on, and `lit-fast "
            f"profile` into lit_fast_profile/."
        )
    return sorted(paths, key=lambda path: int(path.stem.partition("-")[2]))


def left_out(stamps: Sequence[Stamp]) -> list[str]:
    """What is said of files of other runs than the one that is shown."""
    runs: dict[str, list[int]] = {}
    for stamp in stamps:
        runs.setdefault(str(stamp), []).append(stamp.rank)
    return [
        f"Left out: {_some(ranks)} of an earlier run ({run}); delete those files."
        for run, ranks in list(runs.items())[:4]
    ]


def summarize(profile: Profile) -> RankSummary:
    device = profile.devices[0] if profile.devices else record.Device()
    return RankSummary(
        rank=profile.header.rank,
        host=profile.header.host,
        device=device.name or profile.header.device,
        steps=profile.steps.count,
        wall=profile.wall,
        p50=profile.steps.quantile(0.5),
        p99=profile.steps.quantile(0.99),
        longest=profile.steps.maximum,
        phases={row.name: row.seconds for row in profile.phases},
        readings=device.readings,
        throttled=device.throttled,
        errors=device.errors,
        energy=device.energy,
        peak=profile.memory.peak,
        finished=profile.finished,
        ended_by=profile.ended_by,
    )


def doubts(profile: Profile) -> list[str]:
    """What a reader should know before believing the figures of one process."""
    who = f"rank {profile.header.rank}"
    found = [f"{who}: {warning}" for warning in profile.warnings]
    if profile.ended_by:
        found.append(f"{who} was ended by {profile.ended_by}.")
    elif not profile.finished:
        found.append(f"{who} has not ended its run, or was killed: its figures end at its last file.")
    if not profile.steps.count:
        found.append(f"{who} took no step.")
    return found


def own_work(summary: RankSummary) -> float:
    """s a step that a process is busy: without waiting, setting up, and the first rank's own duties."""
    waits = ("communication", "idle", "checkpoint", "logging", "setup", "profiling")
    seconds = summary.wall - sum(summary.phases.get(name, 0.0) for name in waits)
    return seconds / max(1, summary.steps)


def kept_whole(summaries: dict[Path, RankSummary]) -> list[Path]:
    """The files of the ranks whose profiles are kept: all of a few, else rank 0 and the extremes of `own_work`."""
    if len(summaries) <= WHOLE:
        return list(summaries)
    by_work = sorted(summaries, key=lambda path: own_work(summaries[path]))
    first = min(summaries, key=lambda path: summaries[path].rank)
    return list(dict.fromkeys([first, *by_work[:EXTREMES], *by_work[-EXTREMES:]]))


def _profile(path: Path, without: Sequence[str] = ()) -> Profile:
    found = files.read(path, without)
    if not isinstance(found, Profile):
        raise ProfileError(f"{path} is a report, and the profile of one process is wanted.")
    return found


def _some(ranks: Sequence[int], shown: int = 8) -> str:
    """
    >>> _some([3]), _some(list(range(20)), 3)
    ('rank 3', 'ranks 0, 1, 2 and 17 more')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return f"ranks {', '.join(map(str, ranks[:shown]))}{more}"
