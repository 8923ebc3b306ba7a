"""What every benchmark shares: fair comparison, the row that names the machine, and the files of results.

Machines are shared and clocks drift, so things are compared interleaved, round by round in one run, and the
median of the rounds' ratios is reported. Absolute times are printed, never promised.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import math
import os
import platform
import pty
import re
import select
import statistics
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "date commit hardware threads os python torch lit_fast lightning benchmark case value unit limit".split()
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure. `limit` is a promise, as ("<=", 0.5); None where the figure only informs."""

    case: str
    value: float
    unit: str
    limit: tuple[str, float] | None = None

    @property
    def kept(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value <= self.limit[1] if self.limit[0] == "<=" else self.value >= self.limit[1]

    @property
    def limit_text(self) -> str:
        return "" if self.limit is None else f"{self.limit[0]} {self.limit[1]:g}"


class Time(NamedTuple):
    """Seconds by the clock on the wall, and of all threads of the process on a processor.

    Where others use the machine too, the second one is steadier; the first is what a user waits.
    """

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Time:
        return cls(time.perf_counter(), time.process_time())

    def slope(self, longer: Time, steps: int, unit: float) -> Time:
        """What each of `steps` more steps added, where `longer` took that many more; times `unit`."""
        return Time(*((b - a) / steps * unit for a, b in zip(self, longer, strict=True)))


def elapsed(function: Callable[[], Any]) -> Time:
    start = Time.now()
    function()
    end = Time.now()
    return Time(end.wall - start.wall, end.cpu - start.cpu)


Measure: TypeAlias = Callable[[], "float | Time"]


class Rounds:
    """Several cases, measured one after the other in each round; a figure is a number or a Time.

    With `cpu`, the answers below are about the processor's time.
    """

    def __init__(self, measures: Mapping[str, Measure], rounds: int, warmup: int = 1) -> None:
        self.figures: dict[str, list[Time]] = {name: [] for name in measures}
        names = list(measures)
        for index in range(-warmup, rounds):
            # Turning the order each round keeps one case from always following the same other one.
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                figure = measures[name]()
                if index >= 0:
                    self.figures[name].append(figure if isinstance(figure, Time) else Time(figure, math.nan))

    def values(self, name: str, cpu: bool = False) -> list[float]:
        return [figure.cpu if cpu else figure.wall for figure in self.figures[name]]

    def median(self, name: str, cpu: bool = False) -> float:
        return statistics.median(self.values(name, cpu))

    def ratio(self, name: str, base: str, cpu: bool = False) -> float:
        """Median over rounds of `name` divided by `base` of the same round."""
        pairs = zip(self.values(name, cpu), self.values(base, cpu), strict=True)
        return statistics.median(value / other for value, other in pairs)

    def difference(self, name: str, base: str, cpu: bool = False) -> float:
        """Median over rounds of `name` minus `base` of the same round."""
        pairs = zip(self.values(name, cpu), self.values(base, cpu), strict=True)
        return statistics.median(value - other for value, other in pairs)


def hardware() -> str:
    """The processor's name, and the GPU's where torch has been imported and sees one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1] if found else name
    name = f"{name} x{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} / {name}"
    return name


def commit() -> str:
    """Short hash of the checkout, with + where files differ from it; empty outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True, stderr=-3).strip()
        dirty = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True, stderr=-3).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if dirty else "")


def environment(lightning: str = "") -> dict[str, str]:
    import torch

    import lit_fast

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "hardware": hardware(),
        "threads": str(torch.get_num_threads()),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lit_fast": lit_fast.__version__,
        "lightning": lightning,
    }


def save(benchmark: str, rows: Sequence[Row], lightning: str = "") -> None:
    """Appends the rows to results/<benchmark>.csv, each with the machine, the versions and the commit."""
    path = RESULTS / f"{benchmark}.csv"
    path.parent.mkdir(exist_ok=True)
    around = environment(lightning)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            figures = {
                "case": row.case,
                "value": f"{row.value:.6g}",
                "unit": row.unit,
                "limit": row.limit_text,
            }
            writer.writerow({**around, "benchmark": benchmark, **figures})


def show(title: str, rows: Sequence[Row]) -> None:
    print(title)
    width = max(len(row.case) for row in rows)
    for row in rows:
        said = {None: "", True: "kept", False: "NOT KEPT"}[row.kept]
        print(f"  {row.case:<{width}}  {row.value:>12.4g} {row.unit:<8} {row.limit_text:>10} {said}".rstrip())


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise is not kept")
    parser.add_argument("--no-save", action="store_true", help="do not append to benchmarks/results")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default %(default)s)")
    parser.add_argument(
        "--lightning-python",
        metavar="PATH",
        help="an interpreter that has Lightning (pip install lightning==2.6.6), to compare with it",
    )
    return parser


def finish(benchmark: str, title: str, rows: Sequence[Row], options: Any, lightning: str = "") -> int:
    """Prints, saves, and gives the exit code."""
    show(title, rows)
    if not options.no_save:
        save(benchmark, rows, lightning)
    broken = [row.case for row in rows if row.kept is False]
    return 1 if options.check and broken else 0


def in_terminal(command: Sequence[str], cwd: Path | None = None) -> tuple[int, bytes]:
    """Runs a command under a pseudo-terminal of 24 rows of 80, as a user would; returns exit code and output."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new one has 0 columns: bars vanish
    around = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES"):  # they would be believed before the terminal
        around.pop(name, None)
    around["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    around.pop("PYTHONDONTWRITEBYTECODE", None)  # set where nothing may be left behind; a user's imports are cached
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, cwd=cwd, env=around, close_fds=True
    )
    os.close(follower)
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([leader], [], [], 0.2)
        if ready:
            try:
                chunk = os.read(leader, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        elif process.poll() is not None:
            break
    os.close(leader)
    return process.wait(), b"".join(chunks)


def lightning_version(python: str | None) -> str:
    """The version of Lightning that an interpreter has; empty where there is no interpreter."""
    if python is None:
        return ""
    program = "import importlib.metadata as m; print(m.version('lightning'))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} has no Lightning: pip install lightning==2.6.6 there, or leave it out")
    return done.stdout.strip()


def latest(benchmark: str) -> list[dict[str, str]]:
    """The rows of the last run in results/<benchmark>.csv: those that share its date and hardware."""
    path = RESULTS / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[key] == rows[-1][key] for key in ("date", "hardware", "commit"))]


BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def markdown(names: Sequence[str]) -> str:
    """The last runs as one table: every promise, and what Lightning gives beside it."""
    lines = ["| | measured | promised | |", "|---|---:|---:|---|"]
    origins: list[str] = []
    for name in names:
        rows = latest(name)
        shown = [r for r in rows if r["limit"] or (r["case"].startswith("Lightning") and r["unit"] == "x")]
        if not shown:
            continue
        lines.append(f"| **{name.replace('_', ' ')}** | | | |")
        lines += [f"| {r['case']} | {_figure(r)} | {r['limit']} | {_missed(r)} |" for r in shown]
        origins.append(_origin(name, rows[0]))
    return "\n".join([*lines, "", f"<sub>{'; '.join(origins)}</sub>"]) if origins else ""


def headlines(chosen: Sequence[tuple[str, str, str]]) -> str:
    """A short table of `chosen` rows of the last runs, (benchmark, case, what it says), and how many promises hold.

    Raises:
        KeyError: the last run of a benchmark has no such case.
    """
    lines = ["| | measured | promised |", "|---|---:|---:|"]
    origins: dict[str, str] = {}
    for name, case, says in chosen:
        rows = latest(name)
        row = next((row for row in rows if row["case"] == case), None)
        if row is None:
            raise KeyError(f"the last run of {name} has no row {case!r}")
        missed = f" ({_missed(row)})" if _missed(row) else ""
        lines.append(f"| {says} | {_figure(row)} | {row['limit']}{missed} |")
        origins[name] = _origin(name, rows[0])
    return "\n".join([*lines, "", f"<sub>{'; '.join(origins.values())}</sub>"])


def promises(names: Sequence[str]) -> tuple[int, int]:
    """How many of the promises of the last runs are kept, of how many."""
    limited = [row for name in names for row in latest(name) if row["limit"]]
    return sum(not _missed(row) for row in limited), len(limited)


def _figure(row: Mapping[str, str]) -> str:
    return f"{float(row['value']):.3g} {row['unit']}"


def _missed(row: Mapping[str, str]) -> str:
    if not row["limit"]:
        return ""
    comparison, limit = row["limit"].split()
    kept = Row(row["case"], float(row["value"]), row["unit"], (comparison, float(limit))).kept
    return "" if kept else "missed"


def _origin(name: str, row: Mapping[str, str]) -> str:
    beside = f", lightning {row['lightning']}" if row["lightning"] else ""
    commit = row["commit"] or "unknown"
    return f"{name}: {row['hardware']}, torch {row['torch']}{beside}, {row['date'][:10]}, commit {commit}"


def write_between(table: str, path: Path) -> None:
    """Put `table` between the two markers of a page."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
