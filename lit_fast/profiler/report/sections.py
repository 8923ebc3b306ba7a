"""The sections of the page, in its order: what each says in words and tables, and the chart beside it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from lit_fast.profiler import merge
from lit_fast.profiler.record import Phase, Profile, Report
from lit_fast.profiler.report import elements, facts, findings
from lit_fast.profiler.report.units import count, digits, place, quantity, rate, seconds, share

if TYPE_CHECKING:
    from lit_fast.profiler.report.charts import Chart

ROWS = 24  # of a table of named things: hooks, kernels, ranks


class Section:
    """One part of the page: its tables, and the name of its chart where it has one."""

    def __init__(
        self,
        name: str,
        title: str,
        make: Callable[[Report], str],
        chart: Callable[[Report], Chart | None] | None = None,
        note: str = "",
        absent: str = "",
        css: str = "",
    ) -> None:
        self.name, self.title, self.make, self.chart = name, title, make, chart
        self.note, self.absent = note, absent
        self.css = f' class="{css}"' if css else ""


def _found(report: Report) -> str:
    found = report.findings or findings.find(report)
    if not found:
        return elements.paragraph(findings.nothing(report))
    items = []
    for finding in found:
        lost = (
            f' <span class="lost">{seconds(finding.seconds_per_step)} a step</span>' if finding.seconds_per_step else ""
        )
        where = f"<p><code>{escape(finding.where)}</code></p>" if finding.where else ""
        items.append(
            f"<li><b>{escape(finding.title)}</b>{lost}{where}<p>{escape(finding.detail)}</p>"
            f'<p class="sub">{escape(finding.advice)}</p></li>'
        )
    return f'<ol class="findings">{"".join(items)}</ol>'


def _problems(report: Report) -> str:
    said = [*facts.absences(report), *report.problems]
    return f"<ul>{''.join(f'<li>{escape(problem)}</li>' for problem in said)}</ul>" if said else ""


def _phase_table(report: Report) -> str:
    profile = report.profiles[0]
    rows, (factor, unit) = facts.phase_rows(profile), facts.unit(report)
    if not rows:
        return ""
    total = Phase("sum", sum(row.seconds for row in rows), 0, profile.steps, profile.device_steps)
    heads = ["phase", "share", "", "seconds", f"{unit} a step", "p50", "p99"]
    heads += [f"GPU {unit}"] if profile.device_steps.count else []
    head = "".join(f"<th{' class=optional' if h in ('', 'seconds') else ''}>{escape(h)}</th>" for h in heads)
    body = "".join(_phase_row(row, profile, factor, row is total) for row in [*rows, total])
    note = [
        f"Shares and seconds are of the whole run; their sum is its wall time, {seconds(profile.wall)}. The chart and "
        f"the columns to the right are of the steps alone.",
        *facts.outside_of_steps(profile),
    ]
    if profile.device_steps.count:
        note.append(
            f"GPU {unit}: from where the device comes to a phase to where it comes to its end, the mean of "
            f"{count(profile.device_steps.count, 'step')}; idle: it waited for the host between phases."
        )
    note.append(facts.hidden(profile))
    return elements.wide(f"<table><tr>{head}</tr>{body}</table>") + elements.note(" ".join(filter(None, note)))


def _phase_row(row: Phase, profile: Profile, factor: float, is_sum: bool) -> str:
    part = row.seconds / profile.wall if profile.wall else 0.0
    bar = "" if is_sum else f'<span class="share" style="width:{100 * part:.1f}%"></span>'
    cells = [f"<td>{escape(row.name)}</td><td>{share(part)}</td>"]
    cells.append(f'<td class="bar optional">{bar}</td><td class="optional">{row.seconds:.3f}</td>')
    figures = [*facts.in_steps(row, profile, factor), *facts.on_device(row, profile, factor)]
    cells += [f"<td>{figure}</td>" for figure in figures]
    return f"<tr{' class=sum' if is_sum else ''}>{''.join(cells)}</tr>"


def _compared(report: Report) -> str:
    comparison = report.comparison
    if comparison is None or not comparison.rows:
        return ""
    factor, unit = facts.unit(report)
    rows = [[name, *facts.compared(row, factor)] for name, row in facts.compared_rows(comparison).items()]
    heads = [f"{unit} a step", facts.against(comparison), "lit_fast", "change", "ratio", "95 %"]
    return elements.table(heads, rows) + elements.note(" ".join(facts.how_compared(comparison)))


def _slowest(report: Report) -> str:
    profile = report.profiles[0]
    if not profile.steps.count:
        return ""
    if not profile.slowest:
        return " "
    rows = [
        [f"{slow.step:,}", seconds(slow.seconds), seconds(slow.at), facts.cause(slow, profile)]
        for slow in profile.slowest
    ]
    return "<h3>The slowest</h3>" + elements.table(["step", "took", "at", "!!cause"], rows)


def _named(report: Report) -> str:
    profile = report.profiles[0]
    steps = max(1, profile.steps.count)
    # Below a ten-thousandth of the run lie the hooks that nobody overrides.
    parts = sorted(
        (part for part in profile.parts if part.seconds > 1e-4 * profile.wall), key=lambda part: -part.seconds
    )
    rows = [
        [
            part.name,
            part.phase,
            place(part.where),
            f"{part.calls:,}",
            seconds(part.seconds / steps),
            seconds(part.longest) if part.longest else "",
        ]
        for part in parts[:ROWS]
    ]
    more = elements.note(f"{len(parts) - ROWS} more take less.") if len(parts) > ROWS else ""
    return elements.table(["!!name", "!phase", "!where", "calls", "a step", "longest"], rows) + more if rows else ""


def _syncs(report: Report) -> str:
    profile = report.profiles[0]
    steps = profile.window_steps or profile.steps.count or 1
    rows = [
        [
            place(sync.where),
            sync.line.strip(),
            f"{sync.calls / steps:.2f}",
            "not measured" if sync.seconds is None else seconds(sync.seconds / steps),
        ]
        for sync in sorted(profile.syncs, key=lambda sync: (-(sync.seconds or 0.0), -sync.calls))[:ROWS]
    ]
    return elements.table(["!where", "!line", "times a step", "a step"], rows) if rows else ""


def _memory(report: Report) -> str:
    profile = report.profiles[0]
    known = facts.memory(profile)
    return elements.definitions(known) if known else " " if profile.memory.over_step else ""


def _ranks(report: Report) -> str:
    ranks = [rank for rank in facts.ranks(report) if rank.steps]
    if len(ranks) < 2:
        return ""
    by_work = sorted(ranks, key=lambda rank: -merge.own_work(rank))
    shown = by_work if len(by_work) <= ROWS else [*by_work[: ROWS // 2], *by_work[-ROWS // 4 :]]
    rows = []
    for rank in shown:
        sensors = ", ".join(f"{r.name} {quantity(r.mean, r.unit)}" for r in rank.readings)
        why = ", ".join([*(f"{reason} {seconds(s)}" for reason, s in rank.throttled.items() if s),
                         *(f"{n} {name}" for name, n in rank.errors.items() if n)])  # fmt: skip
        state = "" if rank.finished and not rank.ended_by else rank.ended_by or "not ended"
        waits = rank.phases.get("communication", 0.0) / rank.steps
        rows.append([str(rank.rank), rank.host, f"{rank.steps:,}", seconds(merge.own_work(rank)), seconds(waits),
                     seconds(rank.p50), seconds(rank.p99), sensors, why, state])  # fmt: skip
    heads = ["rank", "!host", "steps", "own work", "waits", "p50", "p99", "!!sensors", "!throttled, errors", "!state"]
    used = [n for n in range(len(heads)) if any(row[n] for row in rows)]
    left_out = len(ranks) - len(rows)
    more = elements.note(f"{left_out:,} between them are left out.") if left_out else ""
    return elements.table([heads[n] for n in used], [[row[n] for n in used] for row in rows]) + more


def _kernels(report: Report) -> str:
    profile = report.profiles[0]
    rows = []
    for kernel in sorted(profile.kernels, key=lambda kernel: -kernel.seconds)[:ROWS]:
        speeds = [rate(amount / kernel.seconds, unit) if amount and kernel.seconds else ""
                  for amount, unit in ((kernel.bytes, "B/s"), (kernel.flops, "FLOP/s"))]  # fmt: skip
        headroom = "" if kernel.headroom is None else seconds(kernel.headroom)
        rows.append(
            [
                kernel.name,
                digits(kernel.calls / kernel.steps),
                seconds(kernel.seconds / kernel.steps),
                *speeds,
                headroom,
                kernel.bound or "",
            ]
        )
    if not rows:
        return ""
    ceilings = profile.ceilings
    said = [f"copy {rate(ceilings.copy, 'B/s')}"] if ceilings.copy else []
    said += [f"{dtype} {rate(flops, 'FLOP/s')}" for dtype, flops in ceilings.matmul.items()]
    note = f"Ceilings of this device: {', '.join(said)}. {ceilings.how}" if said else ""
    heads = ["!kernel", "calls a step", "a step", "bytes", "arithmetic", "headroom", "!bound by"]
    return elements.table(heads, rows) + elements.note(note)


def _sensors(report: Report) -> str:
    profile = report.profiles[0]
    rows = []
    for device in profile.devices:
        for reading in device.readings:
            figures = [quantity(value, reading.unit) for value in (reading.mean, reading.minimum, reading.maximum)]
            rows.append([device.name, reading.name, *figures, f"{reading.count:,}"])
    other = [
        f"{device.name}: {reason} {seconds(s)}"
        for device in profile.devices
        for reason, s in device.throttled.items()
        if s
    ]
    other += [f"{device.name}: {n} {name}" for device in profile.devices for name, n in device.errors.items() if n]
    spent = facts.energy(report)
    table = elements.table(["!device", "!sensor", "mean", "least", "most", "readings"], rows) if rows else ""
    return (elements.definitions(spent) if spent else "") + table + "".join(elements.note(text) for text in other)


def _run(report: Report) -> str:
    return elements.definitions(facts.header(report))


def _timeline(report: Report) -> str:
    return " " if report.profiles[0].timeline else ""


# Bokeh is imported when the first chart is made.
def _waterfall(report: Report) -> Chart | None:
    from lit_fast.profiler.report import charts

    profile = report.profiles[0]
    return charts.waterfall(report) if any(row.per_step.total for row in profile.phases) else None


def _ratios(report: Report) -> Chart | None:
    from lit_fast.profiler.report import charts

    return charts.ratios(report.comparison) if report.comparison is not None else None


def _distribution(report: Report) -> Chart:
    from lit_fast.profiler.report import charts

    return charts.distribution(report.profiles[0])


def _timeline_chart(report: Report) -> Chart:
    from lit_fast.profiler.report import charts

    return charts.timeline(report.profiles[0])


def _heat_map(report: Report) -> Chart:
    from lit_fast.profiler.report import charts

    return charts.heat_map(report)


def _memory_chart(report: Report) -> Chart | None:
    from lit_fast.profiler.report import charts

    profile = report.profiles[0]
    return charts.memory(profile) if len(profile.memory.over_step) > 1 else None


def _roofline(report: Report) -> Chart | None:
    from lit_fast.profiler.report import charts

    profile = report.profiles[0]
    placed = any(kernel.flops and kernel.bytes and kernel.seconds for kernel in profile.kernels)
    return charts.roofline(profile) if placed else None


SECTIONS = (
    Section("findings", "What to change first", _found, note="What costs most comes first."),
    Section("problems", "Read with care", _problems, css="problems"),
    Section("run", "The run", _run),
    Section("step", "A step", _phase_table, _waterfall, absent="no phase was recorded"),
    Section(
        "comparison", "Comparison", _compared, _ratios,
        note="Time in lit_fast over time in the baseline, with its 95 % interval. Left of the dashed line lit_fast is "
        "faster. Phases of less than a hundredth of the step are in the table only.",
        absent="lit-fast profile script.py --against eager makes one",
    ),
    Section("steps", "How long steps took", _slowest, _distribution, absent="no step was taken"),
    Section("named", "Hooks and other named parts", _named, absent="none was recorded"),
    Section("timeline", "The last steps", _timeline, _timeline_chart,
            note="The chart zooms out to all that is kept; a click on a name hides it. lit-fast report DIR --trace "
        "writes it for ui.perfetto.dev.",
            absent="not recorded"),
    Section("ranks", "Ranks", _ranks, _heat_map,
            note="Times of a step. Orange, and an arrow up: more than the median rank takes in that phase; blue, and "
            "an arrow down: less. Most work of its own comes first: that rank makes the others wait.",
            absent="one process"),
    Section("memory", "Memory over a step", _memory, _memory_chart,
            note="From the moment at which the step begins.", absent="Trainer(profiler='deep') records it"),
    Section("kernels", "Kernels under the roofline", _kernels, _roofline,
            note="Diamonds are lit_fast's own kernels; the larger, the more time.",
            absent="Trainer(profiler='deep') records kernels"),
    Section("syncs", "Where the host read from the device", _syncs,
            absent="none was seen, or not looked for (profiler='deep')"),
    Section("sensors", "Energy and sensors", _sensors, absent="no sensor was read"),
)  # fmt: skip
