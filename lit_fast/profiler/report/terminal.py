"""A report in the terminal: at the end of fit, and by `lit-fast report`. Fits into 80 columns."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from lit_fast.profiler.record import Phase, Profile, Report
from lit_fast.profiler.report import facts, findings
from lit_fast.profiler.report.units import count, seconds, share

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 80  # of what is written to a file
BAR = 14  # columns of the longest bar
SLOWEST = 5  # steps that are shown; the page has ten
FINDINGS = 5
PROBLEMS = 8


def print_report(report: Report, file: IO[str] | None = None) -> None:
    """Print it: in colours to a terminal, as plain text of 80 columns elsewhere. By default to standard output.

    Example::

        print_report(merge("lit_fast_profile"))
    """
    from rich.console import Console

    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    if file.isatty():
        Console(file=file).print(render(report, ascii_only=not encoding.lower().startswith("utf")))
        return
    plain = io.StringIO()
    Console(file=plain, width=WIDTH, color_system=None).print(
        render(report, ascii_only=not encoding.lower().startswith("utf"))
    )
    text = "".join(f"{line.rstrip()}\n" for line in plain.getvalue().splitlines())
    file.write(text.encode(encoding, "replace").decode(encoding))  # names may have any character


def render(report: Report, ascii_only: bool = False) -> RenderableType:
    """The report as something that rich prints; `ascii_only` for terminals that have no other characters."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    profile = report.profiles[0]
    parts = [_header(report), _phases(report, profile, ascii_only)]
    if facts.hidden(profile):
        parts.append(Text(facts.hidden(profile)))
    if profile.steps.count:
        parts.append(_steps(profile))
    parts.append(_findings(report))
    parts += _problems(report)
    return Group(*(Padding(part, (1, 0, 0, 0)) for part in parts))


def _header(report: Report) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.header(report):
        table.add_row(name, Text(value))
    return Group(Text(f"Where the time went: {facts.whose(report)}", "bold"), table)


def _phases(report: Report, profile: Profile, ascii_only: bool) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows, comparison, (factor, unit) = facts.phase_rows(profile), report.comparison, facts.unit(report)
    largest = max((row.seconds for row in rows), default=1.0)
    total = Phase("sum", sum(row.seconds for row in rows), 0, profile.steps, profile.device_steps)
    table = Table(box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("phase", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    if comparison is None:
        table.add_column("", no_wrap=True, style="cyan", min_width=BAR)
        heads = ["s", f"{unit} a step", "p50", "p99", *(["GPU"] if profile.device_steps.count else [])]
        after = facts.outside_of_steps(profile)
    else:
        # What our steps take stands there once: beside the baseline's, in the windows in which both were measured.
        heads = [facts.against(comparison), "lit_fast", "change", "ratio", "95 %"]
        times = f"Shares are of the recorded run, times {unit} a step."
        after = [" ".join([times, *facts.outside_of_steps(profile)]), *facts.how_compared(comparison)]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    compared = {} if comparison is None else facts.compared_rows(comparison)
    for row in [*rows, total]:
        last = row is total
        cells: list[str | Text] = [Text(row.name), share(row.seconds / profile.wall) if profile.wall else "-"]
        if comparison is None:
            cells.append(Text(f"wall {seconds(profile.wall)}" if last else _bar(row.seconds / largest, ascii_only)))
            cells += [
                f"{row.seconds:.3f}",
                *facts.in_steps(row, profile, factor),
                *facts.on_device(row, profile, factor),
            ]
        else:
            found = compared.get("step" if last else row.name)
            cells += facts.compared(found, factor) if found is not None else ["-"] * len(heads)
        if last:
            table.add_section()
        table.add_row(*cells, style="bold" if last else "")
    return Group(table, *(Text(line, "dim") for line in after))


def _bar(part: float, ascii_only: bool) -> str:
    """Eighths of a column where the terminal has such characters.

    >>> _bar(0.5, False), _bar(0.5, True)
    ('███████', '#######')
    """
    if ascii_only:
        return "#" * round(BAR * part)
    whole, eighths = divmod(round(8 * BAR * part), 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")


def _steps(profile: Profile) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    steps = profile.steps
    spread = ", ".join(f"p{100 * q:.0f} {seconds(steps.quantile(q))}" for q in (0.5, 0.9, 0.99))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for slow in profile.slowest[:SLOWEST]:
        table.add_row(f"step {slow.step:,}", seconds(slow.seconds), Text(facts.cause(slow, profile)))
    line = Text.assemble(("A step: ", "bold"), f"{spread}, longest {seconds(steps.maximum)}")
    head = Text("The slowest, and what took longer in them than in the median step:", "dim")
    return Group(line, head, table) if profile.slowest and steps.count > 1 else line


def _findings(report: Report) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    found = report.findings or findings.find(report)
    if not found:
        return Text(findings.nothing(report), "bold")
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="bold")
    table.add_column(overflow="fold")
    for number, finding in enumerate(found[:FINDINGS], 1):
        text = Text(finding.title, "bold")
        if finding.seconds_per_step:
            text.append(f": {seconds(finding.seconds_per_step)} a step")
        if finding.where:
            text.append(f"\n{finding.where}", "not bold cyan")
        table.add_row(f"{number}.", text.append(f"\n{finding.detail}\n{finding.advice}", "not bold"))
    if len(found) > FINDINGS:
        table.add_row("", f"{count(len(found) - FINDINGS, 'finding')} more: see report.html")
    return table


def _problems(report: Report) -> Iterator[RenderableType]:
    from rich.text import Text

    problems = [*facts.absences(report), *report.problems]
    more = [f"{len(problems) - PROBLEMS} more of this kind."] if len(problems) > PROBLEMS else []
    if problems:
        lines = "\n".join(f"Note: {problem}" for problem in [*problems[:PROBLEMS], *more])
        yield Text(lines, "yellow")
