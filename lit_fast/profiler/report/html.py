"""A report as one file for the browser: charts, tables and scripts inside, no request to anywhere.

The charts are Bokeh's, whose script is inlined (1.3 MB); the rest of the page is what this file writes. All text goes
through `escape`: names of hooks, files and kernels come from users.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from lit_fast.profiler.record import Profile, Report
from lit_fast.profiler.report import elements, facts
from lit_fast.profiler.report.sections import SECTIONS
from lit_fast.profiler.report.units import rate, seconds, share

# The page may run its own scripts and nothing else; a browser refuses every request, whatever a name may contain.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


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
        f"{elements.note(section.note)}{elements.drawn(section.name, charts, divs)}{body}</section>"
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
    step, processes = facts.step_seconds(profile), facts.world_size(report)
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
