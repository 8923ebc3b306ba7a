"""docs/loss_curves.svg from the windows of benchmarks/curves.py: every curve, and below how far each precision's are
from those that they are promised to follow. matplotlib draws."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.curves import FLOAT32, FOREACH, FUSED, OURS, STEP_ALONE, Curves, apart, noise
from benchmarks.harness import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWING = ROOT / "docs" / "loss_curves.svg"
# Okabe and Ito's colours, told apart by the colour-blind. Each by day and by night: the night's stand in a style sheet
# that browsers follow, other readers of SVG show the day's.
INK, PAPER, GRID, BAND, BLUE, RED = "#1f2328", "#ffffff", "#b9c1c9", "#e3e6ea", "#0072b2", "#d55e00"
NIGHT = {INK: "#e6edf3", PAPER: "#0d1117", GRID: "#4a525c", BAND: "#2b313a", BLUE: "#56b4e9", RED: "#e69f00"}
THICK, THIN = 1.8, 0.8


def draw(ends: Sequence[int], curves: dict[str, Curves]) -> None:
    """`ends`: last steps of the windows. `curves`: their means."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": "lit_fast",
        "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.titlelocation": "left",
        "axes.edgecolor": GRID,
        "axes.facecolor": PAPER,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.5, 7.5), layout="constrained", facecolor=PAPER)
        FigureCanvasSVG(figure)
        places = figure.add_gridspec(3, 4, height_ratios=(1.5, 1, 1))
        draw_losses(figure.add_subplot(places[0, :3]), figure.add_subplot(places[0, 3]), ends, curves)
        fields = [figure.add_subplot(places[row, column]) for row in (1, 2) for column in range(4)]
        draw_against_torch(fields[:4], ends, curves)
        draw_against_float32(fields[4:], ends, curves)
        figure.supxlabel("step")
        figure.savefig(DRAWING, metadata={"Date": None, "Creator": None, "Title": "Loss of a small GPT by precision"})
    DRAWING.write_text(with_night(short(DRAWING.read_text())))


def draw_losses(field: Axes, beside: Axes, ends: Sequence[int], curves: dict[str, Curves]) -> None:
    """Every precision's mean over the seeds, on the range of float32's seeds; the last window is written beside."""
    base = curves[FLOAT32][FUSED]
    lowest, highest = zip(*((min(seen), max(seen)) for seen in zip(*base, strict=True)), strict=True)
    field.fill_between(ends, lowest, highest, color=BAND, linewidth=0)
    found = {where: mean_curve(runs[OURS]) for where, runs in curves.items()}
    for curve in found.values():
        field.plot(ends, curve, color=BLUE, linewidth=THIN)
    for where, dashes in ((FLOAT32, ":"), ("all bfloat16", "--")):
        found[f"{FUSED}, {where}"] = mean_curve(curves[where][FUSED])
        field.plot(ends, found[f"{FUSED}, {where}"], dashes, color=INK, linewidth=THICK)
        field.annotate(where, (ends[-1], found[where][-1]), (4, 0), textcoords="offset points", va="center")
    field.set_ylabel("loss, nats a token")
    field.set_title("Loss, mean of the seeds; shaded: what the seeds of float32 span")
    beside.set_axis_off()
    beside.set_title(f"Steps {ends[-1] - ends[0] + 1} to {ends[-1]}, lit_fast", x=-0.1, color=BLUE)
    for line, (name, curve) in enumerate(sorted(found.items(), key=lambda item: -item[1][-1])):
        color = INK if FUSED in name else BLUE
        text = f"{curve[-1]:.3f}  {name}"
        beside.text(-0.1, 0.92 - 0.095 * line, text, transform=beside.transAxes, color=color)


def draw_against_torch(fields: Sequence[Axes], ends: Sequence[int], curves: dict[str, Curves]) -> None:
    """Ours and torch's foreach, less torch's fused of the same seed; shaded, what is promised of the mean distance."""
    exact = {where: runs for where, runs in curves.items() if FUSED in runs}
    for field, (where, runs) in zip(fields, exact.items(), strict=True):
        draw_gaps(field, ends, runs[FOREACH], runs[FUSED], RED, "--")
        draw_gaps(field, ends, runs[OURS], runs[FUSED], BLUE, "-")
        theirs, ours, alone = (apart(runs[name], runs[FUSED])[0] for name in (FOREACH, OURS, STEP_ALONE))
        finish(field, where, 2 * theirs, largest(field))
        field.text(0.03, 0.97, f"torch foreach, {theirs:.2g}", transform=field.transAxes, color=RED, va="top")
        text = f"lit_fast, {ours:.2g}\n(torch's clipping: {alone:.2g})"
        field.text(0.03, 0.03, text, transform=field.transAxes, color=BLUE)
    fields[0].set_ylabel("less torch fused, nats")


def draw_against_float32(fields: Sequence[Axes], ends: Sequence[int], curves: dict[str, Curves]) -> None:
    """Ours less float32 of the same seed; last, float32 less float32 of another seed: the noise, shaded in all."""
    base = curves[FLOAT32][FUSED]
    between = noise(base)[0]
    pairs = list(itertools.combinations(base, 2))
    approximate = {where: runs for where, runs in curves.items() if FUSED not in runs}
    for field, runs in zip(fields[:-1], approximate.values(), strict=True):
        draw_gaps(field, ends, runs[OURS], base, BLUE, "-")
        field.text(0.03, 0.03, f"lit_fast, {apart(runs[OURS], base)[0]:.2g}", transform=field.transAxes, color=BLUE)
    draw_gaps(fields[-1], ends, [one for one, _ in pairs], [other for _, other in pairs], INK, ":")
    fields[-1].text(0.03, 0.03, f"torch fused, {between:.2g}", transform=fields[-1].transAxes)
    height = max(map(largest, fields))
    for field, title in zip(fields, (*approximate, "noise: float32, of another seed"), strict=True):
        finish(field, title, between, height)
    fields[0].set_ylabel("less float32, nats")


def draw_gaps(
    field: Axes,
    ends: Sequence[int],
    ones: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    color: str,
    line: str,
) -> None:
    for one, other in zip(ones, others, strict=True):
        field.plot(ends, [a - b for a, b in zip(one, other, strict=True)], line, color=color, linewidth=THIN)


def largest(field: Axes) -> float:
    return max(map(abs, field.get_ylim()))


def finish(field: Axes, title: str, limit: float, height: float) -> None:
    """Shade what is within the limit; leave room above and below for what is written."""
    field.axhspan(-limit, limit, color=BAND, linewidth=0, zorder=0)
    field.set_title(title.replace(", ", ",\n", 1))
    field.set_ylim(-1.5 * height, 1.5 * height)
    field.locator_params(axis="y", nbins=5)
    field.yaxis.set_major_formatter("{x:g}")


def mean_curve(seeds: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]


def short(svg: str) -> str:
    """Coordinates, which stand in tags, to hundredths of a point."""
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)


def with_night(svg: str) -> str:
    """The colours are inline styles: only rules marked important can replace them."""
    rules = "".join(
        f'[style*="{kind}: {day}"]{{{kind}:{night}!important}}'
        for day, night in NIGHT.items()
        for kind in ("fill", "stroke")
    )
    start = svg.index("<defs>")
    return f"{svg[:start]}<style>@media (prefers-color-scheme: dark){{{rules}}}</style>\n {svg[start:]}"
