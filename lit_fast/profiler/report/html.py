"""A report as one file for the browser: charts, tables and scripts inside, no request to anywhere.

The charts are Bokeh's, whose script is inlined (1.3 MB); the rest of the page is what this file writes. All text goes
through `escape`: names of hooks, files and kernels come from users.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lit_fast.profiler import merge
from lit_fast.profiler.record import Compared, Phase, Profile, Report
from lit_fast.profiler.report import facts, findings
from lit_fast.profiler.report.units import count, digits, place, quantity, rate, seconds, share

if TYPE_CHECKING:
    from lit_fast.profiler.report.charts import Chart

# The page may run its own scripts and nothing else; a browser refuses every request, whatever a name may contain.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
HATCHES = {"/": "slashed", "x": "crossed", "-": "lined", ".": "dotted"}  # Bokeh's patterns: classes of page.css
ROWS = 24  # of a table of named things: hooks, kernels, ranks


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page; the file before, if there is one, stays until the new one is whole.

    Raises:
        ModuleNotFoundError: Bokeh is not installed.

    Example::

        write_html(merge("lit_fast_profile"), "report.html")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(page(report), encoding="utf-8")
    beside.replace(path)


def page(report: Report) -> str:
    """The whole of the HTML."""
    try:
        from bokeh.embed import components
        from bokeh.resources import Resources
    except ImportError as error:
        raise ModuleNotFoundError("report.html is drawn by Bokeh: pip install 'lit-fast[profile]'.") from error

    made, absent = [], []
    for section in SECTIONS:
        body = section.make(report)
        if body:
            made.append((section, body))
        elif section.absent:
            absent.append(f"{section.title}: {section.absent}")
    drawn = ((section.name, section.chart(report)) for section, _ in made if section.chart is not None)
    charts = {name: chart for name, chart in drawn if chart is not None}
    script, divs = components({name: chart.figure for name, chart in charts.items()}) if charts else ("", {})
    title = f"{report.profiles[0].header.module or 'A run'}: where the time went"
    own = resources.files(__package__)
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section, _ in made)
    sections = "".join(
        f'<section id="{section.name}"{section.css}><h2>{escape(section.title)}</h2>'
        f"{_note(section.note)}{_drawn(section.name, charts, divs)}{body}</section>"
        for section, body in made
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{(own / "page.css").read_text()}</style>
{Resources(mode="inline", components=["bokeh"]).render_js()}
</head>
<body>
<header class="top"><div><h1>{escape(title)}</h1><p class="sub">{escape(_subtitle(report))}</p></div>
<button id="theme" type="button">Dark</button></header>
<main>
<nav>{links}</nav>
{_tiles(report)}
<noscript><p>The charts need JavaScript, which runs from this file alone.</p></noscript>
{sections}
{_not_shown(absent, report.profiles[0])}
<footer>{escape(facts.own_cost(report.profiles[0]))}</footer>
</main>
{script}
<script>{(own / "page.js").read_text()}</script>
</body>
</html>
"""


# -- sections: each returns its HTML, empty where there is nothing to show


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
        return "<p>Nothing stands out.</p>"
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
    rows, comparison = facts.phase_rows(profile), report.comparison
    if not rows:
        return ""
    compared = {row.name: row for row in comparison.rows} if comparison is not None else {}
    heads = ["phase", "share", "", "seconds", "ms a step", "p50", "p99"]
    heads += ["GPU ms"] if profile.device_steps.count else []
    if comparison is not None:
        heads += [comparison.against, "ratio", "95 %"]
    lines = [_phase_row(row, profile, compared) for row in rows]
    total = Phase("sum", sum(row.seconds for row in rows), 0, profile.steps, profile.device_steps)
    lines.append(_phase_row(total, profile, compared, "step"))
    note = (
        f"Shares and seconds are of the whole run; their sum is its wall time, {seconds(profile.wall)}. The chart and "
    )
    note += "the columns to the right are of the steps alone."
    if profile.device_steps.count:
        note += (
            f" GPU ms: from where the device comes to a phase to where it comes to its end, the mean of "
            f"{count(profile.device_steps.count, 'step')}; idle: it waited for the host between phases."
        )
    if facts.hidden(profile):
        note += f" {facts.hidden(profile)}"
    if comparison is not None:
        windows = f"{count(comparison.windows, 'alternation')} of {count(comparison.steps, 'step')}"
        note += f" Against {comparison.against}: {windows}"
        if comparison.largest_loss_difference is not None:
            note += f", losses within {comparison.largest_loss_difference:.1e} of each other"
            note += f" (bound {comparison.loss_bound:.1e})" if comparison.loss_bound is not None else ""
        note += "".join([".", *(f" {said}" for said in comparison.notes)])
    body = "".join(lines)
    head = "".join(f"<th{' class=optional' if h in ('', 'seconds') else ''}>{escape(h)}</th>" for h in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{_note(note)}'


def _phase_row(row: Phase, profile: Profile, compared: dict[str, Compared], against: str | None = None) -> str:
    part = row.seconds / profile.wall if profile.wall else 0.0
    cells = [f"<td>{escape(row.name)}</td><td>{share(part)}</td>"]
    bar = "" if against else f'<span class="share" style="width:{100 * part:.1f}%"></span>'
    cells.append(f'<td class="bar optional">{bar}</td><td class="optional">{row.seconds:.3f}</td>')
    figures = [*facts.in_steps(row, profile), *facts.on_device(row, profile)]
    cells += [f"<td>{figure}</td>" for figure in figures]
    if compared:
        found = compared.get(against or row.name)
        texts = ["", "", ""]
        if found is not None:
            texts = [digits(1e3 * found.baseline), f"{found.ratio:.2f}", f"{found.low:.2f} to {found.high:.2f}"]
        cells += [f"<td>{text}</td>" for text in texts]
    return f"<tr{' class=sum' if against else ''}>{''.join(cells)}</tr>"


def _compared(report: Report) -> str:
    if report.comparison is None or not report.comparison.rows:
        return ""
    return " "


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
    return "<h3>The slowest</h3>" + _table(["step", "took", "at", "!cause"], rows)


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
    more = _note(f"{len(parts) - ROWS} more take less.") if len(parts) > ROWS else ""
    return _table(["!name", "!phase", "!where", "calls", "a step", "longest"], rows) + more if rows else ""


def _syncs(report: Report) -> str:
    profile = report.profiles[0]
    steps = profile.window_steps or profile.steps.count or 1
    rows = [
        [
            place(sync.where),
            sync.line.strip(),
            f"{sync.calls / steps:.2f}",
            "" if sync.seconds is None else seconds(sync.seconds / steps),
        ]
        for sync in sorted(profile.syncs, key=lambda sync: (-(sync.seconds or 0.0), -sync.calls))[:ROWS]
    ]
    return _table(["!where", "!line", "times a step", "a step"], rows) if rows else ""


def _memory(report: Report) -> str:
    profile = report.profiles[0]
    known = facts.memory(profile)
    return _definitions(known) if known else " " if profile.memory.over_step else ""


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
    heads = ["rank", "!host", "steps", "own work", "waits", "p50", "p99", "!sensors", "!throttled, errors", "!state"]
    used = [n for n in range(len(heads)) if any(row[n] for row in rows)]
    left_out = len(ranks) - len(rows)
    more = _note(f"{left_out:,} between them are left out.") if left_out else ""
    return _table([heads[n] for n in used], [[row[n] for n in used] for row in rows]) + more


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
    return _table(heads, rows) + _note(note)


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
    table = _table(["!device", "!sensor", "mean", "least", "most", "readings"], rows) if rows else ""
    return (_definitions(spent) if spent else "") + table + "".join(_note(text) for text in other)


def _run(report: Report) -> str:
    return _definitions(facts.header(report))


def _timeline(report: Report) -> str:
    return " " if report.profiles[0].timeline else ""


# Bokeh is imported when the first chart is made.
def _waterfall(report: Report) -> Chart | None:
    from lit_fast.profiler.report import charts

    profile = report.profiles[0]
    return charts.waterfall(profile) if any(row.per_step.total for row in profile.phases) else None


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

    return charts.heat_map(facts.ranks(report))


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
    Section("findings", "Findings", _found, note="What costs most comes first."),
    Section("problems", "Read with care", _problems, css="problems"),
    Section("run", "The run", _run),
    Section("step", "A step", _phase_table, _waterfall, absent="no phase was recorded"),
    Section(
        "comparison", "Comparison", _compared, _ratios,
        note="Ratio of the times of a step, with a bootstrap's 95 % interval. Left of the dashed line we are faster.",
        absent="lit-fast profile script.py --against eager makes one",
    ),
    Section("steps", "How long steps took", _slowest, _distribution, absent="no step was taken"),
    Section("named", "Hooks and other named parts", _named, absent="none was recorded"),
    Section("timeline", "The last steps", _timeline, _timeline_chart,
            note="The chart zooms out to all that is kept; a click on a name hides it. lit-fast report DIR --trace "
        "writes it for ui.perfetto.dev.",
            absent="not recorded"),
    Section("ranks", "Ranks", _ranks, _heat_map,
            note="Colour: more (orange) or less (blue) than the median rank in that phase; the numbers are ms a step. "
            "Most work of its own comes first: that rank makes the others wait.", absent="one process"),
    Section("memory", "Memory over a step", _memory, _memory_chart,
            note="From the moment at which the step begins.", absent="Trainer(profiler='deep') records it"),
    Section("kernels", "Kernels under the roofline", _kernels, _roofline,
            note="Diamonds are lit_fast's own kernels; the larger, the more time.",
            absent="Trainer(profiler='deep') records kernels"),
    Section("syncs", "Where the host read from the device", _syncs,
            absent="none was seen, or not looked for (profiler='deep')"),
    Section("sensors", "Energy and sensors", _sensors, absent="no sensor was read"),
)  # fmt: skip


# -- pieces


def _subtitle(report: Report) -> str:
    profile = report.profiles[0]
    figures = f"figures of {facts.whose(report)}" if facts.world_size(report) > 1 else ""
    kind = f"{profile.header.mode} profile"
    return ", ".join(part for part in (profile.header.script, profile.header.device, kind, figures) if part)


def _tiles(report: Report) -> str:
    profile = report.profiles[0]
    head, steps = profile.header, profile.steps.count
    if not steps or not profile.wall:
        return ""
    step, processes = profile.steps.mean, facts.world_size(report)
    tiles = [(seconds(step), "a step, on average"), (seconds(profile.steps.quantile(0.99)), "p99 of a step")]
    for amount, unit in ((head.samples_per_step, "samples/s"), (head.tokens_per_step, "tokens/s")):
        if amount:
            text, _, counted = rate(amount * processes / step, unit).partition(" ")
            tiles.append((text, counted + (f", {processes:,} processes" if processes > 1 else "")))
    if head.flops_per_step and head.peak_flops:
        tiles.append((share(head.flops_per_step / step / head.peak_flops), "model FLOPs utilization"))
    tiles.append((share(profile.unexplained), "of the time unexplained"))
    step_ratio = (
        next((row for row in report.comparison.rows if row.name == "step"), None) if report.comparison else None
    )
    if report.comparison is not None and step_ratio is not None:
        tiles.append((f"{step_ratio.ratio:.2f}", f"of the time of {report.comparison.against}"))
    cells = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in tiles)
    return f'<div class="tiles">{cells}</div>'


def _not_shown(absent: Sequence[str], profile: Profile) -> str:
    notes = [*profile.header.notes, *absent]
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section id="not-shown"><h2>Not measured, not shown</h2><ul>{items}</ul></section>'


def _table(heads: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """A head that begins with "!" is of a column of words, to the left; the others hold numbers."""
    heads = list(heads)
    words = [head.startswith("!") for head in heads]
    top = "".join(
        f"<th{' class=words' if word else ''}>{escape(head.lstrip('!'))}</th>"
        for head, word in zip(heads, words, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=words' if word else ''}>{escape(cell)}</td>" for cell, word in zip(row, words, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _definitions(rows: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows)}</dl>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _drawn(name: str, charts: dict[str, Chart], divs: dict[str, str]) -> str:
    """A chart's place, and its key as buttons: they wrap on a phone and can be reached without a mouse."""
    if name not in charts:
        return ""
    keys = "".join(
        f'<button type="button" class="key" aria-pressed="true" data-renderer="{escape(key.renderer)}">'
        f'<i class="{HATCHES.get(key.hatch, "")}" style="--swatch:{key.colour}"></i>{escape(key.name)}</button>'
        for key in charts[name].keys
    )
    return f'<div class="chart">{divs[name]}</div>' + (f'<div class="keys">{keys}</div>' if keys else "")
