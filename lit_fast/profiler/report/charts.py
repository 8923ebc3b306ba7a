"""The charts of the page, one function each, as Bokeh figures. Nothing here is imported unless a page is written.

Colours of text, axes and grids are set in the browser (page.js), which knows whether it is dark. Whatever carries a
meaning by its colour carries it by a label, a hatch or a place as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.core.properties import value as constant
from bokeh.models import (
    BasicTickFormatter,
    BoxZoomTool,
    ColumnDataSource,
    FactorRange,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    PanTool,
    Range1d,
    ResetTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from lit_fast.profiler.merge import own_work
from lit_fast.profiler.record import PHASES, Comparison, Profile, RankSummary, Report, Span, bucket_end
from lit_fast.profiler.report import facts, palette
from lit_fast.profiler.report.units import digits, rate, seconds, share

ROW = 26  # pixels of a bar and the gap below it
TIMELINE_SPANS = 2500  # that are drawn: some 300 kB of the page
SHOWN = 8  # steps of the timeline at first sight
LEAST_COMPARED = 0.01  # of the step: ratios of less are noise, and would stretch the axis
LABELLED = 6  # kernels with their names in the chart; the table beside it has all
OWN_COLOUR = "own-colour"  # a tag: page.js leaves the model's colours alone
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
TEXT: dict[str, Any] = {"text_font": constant(FONT), "text_font_size": "12px"}


@dataclass
class Key:
    """A name of a chart's key, which the page draws as a button: it shows and hides what it names."""

    name: str
    renderer: str  # Bokeh's id
    colour: str
    hatch: str


@dataclass
class Chart:
    figure: Any
    keys: list[Key] = field(default_factory=list)


def waterfall(report: Report) -> Chart:
    """The step from left to right: each phase begins where the one before has ended; the last row is their sum."""
    profile, (factor, unit) = report.profiles[0], facts.unit(report)
    rows = [row for row in facts.phase_rows(profile) if row.per_step.total]
    each = [factor * facts.in_step(row, profile) for row in rows]
    ends = np.cumsum(each)
    total = float(ends[-1])
    names = [*(row.name for row in rows), "step"]
    plot = _figure(names, height=ROW * len(names) + 60, x_axis_label=f"{unit} of a step, the mean of all")
    plot.x_range = Range1d(start=0.0, end=1.02 * total)
    left, right = [*(ends - each), 0.0], [*ends, total]
    looks = [*(palette.of_phase(row.name) for row in rows), ("#5B6470", " ")]
    texts = [f"{digits(time)} {unit}  {share(time / total)}" for time in [*each, total]]
    source = ColumnDataSource(
        {
            "name": names,
            "left": left,
            "right": right,
            "colour": [colour for colour, _ in looks],
            "hatch": [hatch for _, hatch in looks],
            "ink": [palette.ink(colour) for colour, _ in looks],
            "text": texts,
        }
    )
    plot.hbar(
        y="name", left="left", right="right", height=0.72, source=source, fill_color="colour",
        line_color=palette.EDGE, hatch_pattern="hatch", hatch_color="ink", hatch_alpha=0.5, hatch_scale=7,
        hatch_weight=1.4,
    )  # fmt: skip
    # To the right of a bar where there is room, else to its left, and inside where there is neither.
    beside: dict[str, list[Any]] = {"x": [], "name": [], "text": [], "align": [], "dx": [], "own": []}
    for name, begin, end, text in zip(names, left, right, texts, strict=True):
        place = (
            (end, "left", 6)
            if end < 0.62 * total
            else (begin, "right", -6)
            if begin > 0.38 * total
            else (end, "right", -8)
        )
        own = place[2] == -8
        # On a phone there is no room for its share inside a bar.
        fits = text.partition("  ")[0] if own and name != "step" else text
        for key, value in zip(beside, (place[0], name, fits, place[1], place[2], own), strict=True):
            beside[key].append(value)
    for inside in (False, True):
        picked = [number for number, own in enumerate(beside["own"]) if own is inside]
        data = ColumnDataSource({key: [beside[key][number] for number in picked] for key in beside})
        texts_drawn = plot.text(
            x="x", y="name", text="text", text_align="align", x_offset="dx", text_baseline="middle", source=data,
            **TEXT,
        )  # fmt: skip
        if inside:
            texts_drawn.glyph.text_color = "white"
            texts_drawn.glyph.text_font_style = "bold"
            texts_drawn.glyph.tags = [OWN_COLOUR]
    plot.add_tools(HoverTool(tooltips=[("@name", "@text")]))
    return Chart(plot)


def ratios(comparison: Comparison) -> Chart:
    """Ours against the baseline: a point a row, with its interval; left of the line at 1 we are faster."""
    step = next(row for row in comparison.rows if row.name == "step")
    rows = [
        row
        for row in comparison.rows
        if math.isfinite(row.ratio) and max(row.ours, row.baseline) >= LEAST_COMPARED * step.baseline
    ]
    names = [row.name for row in rows]
    plot = _figure(names, height=ROW * len(names) + 76, x_axis_label=f"time in lit_fast / time in {comparison.against}")
    low, high = min([0.9, *(row.low for row in rows)]), max([1.1, *(row.high for row in rows)])
    plot.x_range = Range1d(start=low - 0.15 * (high - low), end=high + 0.15 * (high - low))
    source = ColumnDataSource(
        {
            "name": names,
            "low": [row.low for row in rows],
            "high": [row.high for row in rows],
            "ratio": [row.ratio for row in rows],
            "text": [f"{row.ratio:.2f}" for row in rows],
            "interval": [f"{row.low:.2f} to {row.high:.2f}" for row in rows],
            # On the side that looks away from the line at 1.
            "beside": [row.low if row.ratio < 1.0 else row.high for row in rows],
            "off": [-8 if row.ratio < 1.0 else 8 for row in rows],
            "align": ["right" if row.ratio < 1.0 else "left" for row in rows],
        }
    )
    plot.vspan(x=1.0, line_width=1.5, line_dash="dashed", line_color=palette.GREY)
    plot.segment(x0="low", x1="high", y0="name", y1="name", source=source, line_width=3, line_color=palette.BLUE)
    points = plot.scatter(
        x="ratio", y="name", size=11, source=source, fill_color=palette.BLUE, line_color="white", marker="diamond"
    )
    plot.text(
        x="beside", y="name", text="text", x_offset="off", text_align="align", text_baseline="middle", source=source,
        **TEXT,
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[points], tooltips=[("@name", "@text"), ("95 %", "@interval")]))
    return Chart(plot)


def distribution(profile: Profile) -> Chart:
    """How long steps took: counts on the histogram's own grid, both axes logarithmic, quantiles named."""
    steps = profile.steps
    indices = sorted(steps.buckets)
    counts = [steps.buckets[index] for index in indices]
    edges = [(1e-6 * (bucket_end(index - 1) if index else 0), 1e-6 * bucket_end(index)) for index in indices]
    marks = [(f"p{100 * q:.0f}", 1e3 * steps.quantile(q)) for q in (0.5, 0.9, 0.99)]
    marks.append(("longest", 1e3 * steps.maximum))
    plot = _figure(
        None, height=300, x_axis_label="ms a step", y_axis_label="steps", x_axis_type="log", y_axis_type="log"
    )
    plot.xaxis.formatter, plot.yaxis.formatter = BasicTickFormatter(), BasicTickFormatter()
    first, last = max(edges[0][0], 1e-6), edges[-1][1]
    # At least a third of a decade, so that steps that are all alike are a narrow column.
    room = max(1.08, (10 ** (1 / 3) / (last / first)) ** 0.5)
    plot.x_range = Range1d(start=first / room, end=last * room)
    top = max(counts)
    plot.y_range = Range1d(start=0.6, end=top * 8.0)
    source = ColumnDataSource(
        {"left": [e[0] for e in edges], "right": [e[1] for e in edges], "top": counts, "bottom": [0.6] * len(counts)}
    )
    bars = plot.quad(left="left", right="right", top="top", bottom="bottom", source=source, fill_color=palette.SKY,
                     line_color=palette.BLUE)  # fmt: skip
    for number, (name, at) in enumerate(marks):
        height = top * 5.2 / 1.75**number  # one below the other, so that close ones can be read
        plot.segment(
            x0=[at], x1=[at], y0=[0.6], y1=[height], line_dash="dashed", line_color=palette.VERMILION, line_width=1.5
        )
        leans = at > math.sqrt(plot.x_range.start * plot.x_range.end)
        plot.text(
            x=[at], y=[height], text=[f"{name} {seconds(at * 1e-3)}"], text_baseline="top", x_offset=-5 if leans else 5,
            text_align="right" if leans else "left", **TEXT,
        )  # fmt: skip
    plot.add_tools(
        HoverTool(
            renderers=[bars], tooltips=[("from", "@left{0.000} ms"), ("to", "@right{0.000} ms"), ("steps", "@top")]
        )
    )
    return Chart(plot)


def memory(profile: Profile) -> Chart:
    """Bytes by category over one step, stacked."""
    samples = profile.memory.over_step
    data: dict[str, list[Any]] = {
        "at": [1e3 * sample.at for sample in samples],
        "point": [sample.point for sample in samples],
    }
    kinds = [kind for kind in palette.MEMORY if any(getattr(sample, kind) for sample in samples)]
    for kind in kinds:
        data[kind] = [getattr(sample, kind) / 2**20 for sample in samples]
    data["sum"] = [sum(data[kind][i] for kind in kinds) for i in range(len(samples))]
    plot = _figure(None, height=320, x_axis_label="ms", y_axis_label="MiB")
    plot.y_range.start = 0.0
    plot.x_range.range_padding = 0.02
    source = ColumnDataSource(data)
    areas = plot.varea_stack(
        kinds,
        x="at",
        source=source,
        fill_color=[palette.MEMORY[kind][0] for kind in kinds],
        fill_alpha=0.9,
        hatch_pattern=[palette.MEMORY[kind][1] for kind in kinds],
        hatch_color=[palette.ink(palette.MEMORY[kind][0]) for kind in kinds],
        hatch_alpha=0.6,
    )
    keys = [Key(kind, area.id, *palette.MEMORY[kind]) for kind, area in zip(kinds, areas, strict=True)]
    line = plot.line(x="at", y="sum", source=source, line_color=palette.GREY, line_width=1.5)
    tips = [
        ("at", "@at{0.00} ms, @point"),
        *((kind, f"@{kind}{{0.0}} MiB") for kind in kinds),
        ("sum", "@sum{0.0} MiB"),
    ]
    plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=tips))
    return Chart(plot, keys[::-1])


def heat_map(report: Report) -> Chart:
    """Rank by phase: colour and arrow are how far a rank is from the median of its phase, the number what it takes."""
    ranks, (factor, unit) = [summary for summary in facts.ranks(report) if summary.steps], facts.unit(report)
    phases = [name for name in PHASES if any(rank.phases.get(name) for rank in ranks)]
    each = np.array([[factor * rank.phases.get(name, 0.0) / rank.steps for rank in ranks] for name in phases])
    beyond = each - np.median(each, axis=1, keepdims=True)
    most = float(np.abs(beyond).max()) or 1e-9
    shape = (len(phases), len(ranks))
    plot = _figure(
        None, height=ROW * len(phases) + 76, x_axis_label=f"rank ({unit} a step)",
        x_range=Range1d(start=-0.5, end=shape[1] - 0.5), y_range=Range1d(start=shape[0] - 0.5, end=-0.5),
    )  # fmt: skip
    cells_drawn = plot.image(
        image=[beyond.astype(np.float32)], x=-0.5, y=-0.5, dw=shape[1], dh=shape[0],
        color_mapper=LinearColorMapper(palette=palette.diverging(), low=-most, high=most), origin="bottom_left",
        anchor="bottom_left",
    )  # fmt: skip
    said = [("column, row", "$x{0}, $y{0}"), ("more than the median", f"@image{{0.00}} {unit}")]
    plot.add_tools(HoverTool(renderers=[cells_drawn], tooltips=said))
    plot.grid.visible = False
    plot.yaxis.ticker = FixedTicker(ticks=list(range(shape[0])))
    plot.yaxis.major_label_overrides = dict(enumerate(phases))
    names = [str(rank.rank) for rank in ranks]
    if len(ranks) <= 32:
        plot.xaxis.ticker = FixedTicker(ticks=list(range(shape[1])))
    if names != [str(number) for number in range(len(names))]:
        plot.xaxis.major_label_overrides = dict(enumerate(names))
    if len(ranks) <= 12:
        cells = [(x, y) for y in range(shape[0]) for x in range(shape[1])]
        for strong in (False, True):
            picked = [(x, y) for x, y in cells if bool(abs(beyond[y, x]) > 0.55 * most) is strong]
            text = plot.text(
                x=[x for x, _ in picked], y=[y for _, y in picked],
                text=[digits(each[y, x]) + _arrow(beyond[y, x] / most) for x, y in picked],
                text_align="center", text_baseline="middle", **TEXT,
            )  # fmt: skip
            if strong:
                text.glyph.text_color, text.glyph.tags = "white", [OWN_COLOUR]
    _mark_slowest(plot, ranks)
    return Chart(plot)


def _arrow(part: float) -> str:
    """For those who see no colours: where the colour is strong enough to be seen."""
    return " ▲" if part > 0.25 else " ▼" if part < -0.25 else ""


def _mark_slowest(plot: Any, ranks: Sequence[RankSummary]) -> None:
    """A triangle above the column of the rank that does most itself: a column of a thousand is a pixel wide."""
    place = max(range(len(ranks)), key=lambda number: own_work(ranks[number]))
    plot.y_range.end = -1.3
    plot.scatter(
        x=[place], y=[-0.75], size=10, marker="inverted_triangle", fill_color=palette.VERMILION, line_color="white"
    )
    leans = place >= len(ranks) / 2
    plot.text(
        x=[place], y=[-0.85], text=["most own work"], x_offset=-10 if leans else 10,
        text_align="right" if leans else "left", text_baseline="middle", **TEXT,
    )  # fmt: skip


def roofline(profile: Profile) -> Chart:
    """Kernels by FLOPs a byte and FLOP/s, under what this device's memory and arithmetic allow."""
    ceilings = profile.ceilings
    placed = [k for k in profile.kernels if k.flops and k.bytes and k.seconds]
    x = [k.flops / k.bytes for k in placed if k.flops and k.bytes]
    y = [k.flops / k.seconds for k in placed if k.flops]
    top = max([*ceilings.matmul.values(), *y])
    ridge = top / ceilings.copy if ceilings.copy else max(x)
    plot = _figure(
        None, height=400, x_axis_label="FLOPs a byte", y_axis_label="FLOP/s", x_axis_type="log", y_axis_type="log",
        x_range=Range1d(start=min([0.05, *x]) / 2, end=max([20.0 * ridge, *x]) * 2),
        y_range=Range1d(start=min(y) / 8, end=top * 4),
    )  # fmt: skip
    begin, end = plot.x_range.start, plot.x_range.end
    if ceilings.copy:
        plot.line(x=[begin, ridge], y=[begin * ceilings.copy, top], line_width=2, line_color=palette.GREY)
        at = max(begin * 3, plot.y_range.start * 8 / ceilings.copy)
        plot.text(
            x=[at], y=[at * ceilings.copy], text=[f"memory: {rate(ceilings.copy, 'B/s')}"], 
            y_offset=-10, text_align="left", text_baseline="bottom", **TEXT,
        )  # fmt: skip
    for dtype, flops in ceilings.matmul.items():
        starts = flops / ceilings.copy if ceilings.copy else begin
        plot.line(x=[starts, end], y=[flops, flops], line_width=2, line_color=palette.GREY, line_dash="solid")
        plot.text(
            x=[end], y=[flops], text=[f"{dtype}: {rate(flops, 'FLOP/s')}"], text_align="right", x_offset=-4,
            y_offset=-4, text_baseline="bottom", **TEXT,
        )  # fmt: skip
    longest = max(k.seconds for k in placed)
    ours = [k.name.startswith("lit_fast") for k in placed]
    source = ColumnDataSource(
        {
            "x": x,
            "y": y,
            "name": [k.name for k in placed],
            "size": [8 + 16 * math.sqrt(k.seconds / longest) for k in placed],
            "marker": ["diamond" if own else "circle" for own in ours],
            "colour": [palette.VERMILION if own else palette.BLUE for own in ours],
            "time": [seconds(k.seconds / k.steps) for k in placed],
            "speed": [f"{rate(f, 'FLOP/s')}, {rate(b, 'B/s')}" for f, b in
                      ((k.flops / k.seconds, k.bytes / k.seconds) for k in placed if k.flops and k.bytes)],
        }
    )  # fmt: skip
    points = plot.scatter(
        x="x",
        y="y",
        size="size",
        marker="marker",
        source=source,
        fill_color="colour",
        fill_alpha=0.8,
        line_color="white",
    )
    order: list[int] = []  # the longest first, and none whose name would lie on another's
    for n in sorted(range(len(placed)), key=lambda number: -placed[number].seconds):
        if len(order) < LABELLED and not any(0.5 < y[n] / y[m] < 2.0 and 0.1 < x[n] / x[m] < 10.0 for m in order):
            order.append(n)
    middle = math.sqrt(begin * end)
    plot.text(
        x=[x[n] for n in order], y=[y[n] for n in order], text=[_short(placed[n].name) for n in order],
        text_align=["left" if x[n] < middle else "right" for n in order],
        x_offset=[14 if x[n] < middle else -14 for n in order], text_baseline="middle", **TEXT,
    )  # fmt: skip
    tips = [("kernel", "@name"), ("a step", "@time"), ("reaches", "@speed")]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tips))
    return Chart(plot)


def timeline(profile: Profile) -> Chart:
    """The last steps, one row a track. A click on a name of its key hides it."""
    spans = sorted(profile.timeline, key=lambda span: span.begin)[-TIMELINE_SPANS:]
    tracks = list(
        dict.fromkeys([*(t for t in ("phases", "hooks", "collectives", "kernels")), *(s.track for s in spans)])
    )
    tracks = [track for track in tracks if any(span.track == track for span in spans)]
    origin = spans[0].begin
    plot = _figure(tracks, height=70 * len(tracks) + 150, x_axis_label="ms")
    groups: dict[tuple[str, str], list[Any]] = {}
    for span in spans:
        groups.setdefault((span.track, span.name if span.track == "phases" else ""), []).append(span)
    keys = []
    for (track, name), members in groups.items():
        colour, hatch = palette.of_phase(name) if track == "phases" else TRACKS.get(track, palette.OTHER)
        source = ColumnDataSource(
            {
                "left": [1e3 * (s.begin - origin) for s in members],
                "right": [1e3 * (s.begin - origin + s.seconds) for s in members],
                "track": [track] * len(members),
                "name": [s.name for s in members],
                "took": [seconds(s.seconds) for s in members],
                "step": ["" if s.step is None else f"step {s.step:,}" for s in members],
            }
        )
        bars = plot.hbar(
            y="track", left="left", right="right", height=0.7, source=source, fill_color=colour, line_color=colour,
            line_width=0.5, hatch_pattern=hatch, hatch_color=palette.ink(colour), hatch_alpha=0.6, hatch_scale=7,
        )  # fmt: skip
        keys.append(Key(name or f"track of {track}", bars.id, colour, hatch))
    begin, end = _first_sight(spans)
    plot.x_range = Range1d(start=1e3 * (begin - origin), end=1e3 * (end - origin))
    tools = [
        PanTool(dimensions="width"),
        WheelZoomTool(dimensions="width"),
        BoxZoomTool(dimensions="width"),
        ResetTool(),
    ]
    plot.add_tools(*tools, HoverTool(tooltips=[("@name", "@took"), ("", "@step")]))
    plot.toolbar.active_drag = None  # a finger that scrolls the page must not move the chart
    plot.toolbar_location = "above"
    plot.toolbar.logo = None
    return Chart(plot, keys)


TRACKS = {"hooks": (palette.PURPLE, "/"), "collectives": (palette.VERMILION, "/"), "kernels": (palette.GREEN, "x")}


def _figure(rows: Sequence[str] | None, **options: Any) -> Any:
    """As wide as its place on the page. `rows`: names on the vertical axis, from top to bottom."""
    if rows is not None:
        options["y_range"] = FactorRange(factors=list(rows)[::-1], range_padding=0.02)
    # Bokeh's own maths in labels would need a larger script.
    plot = figure(
        sizing_mode="stretch_width", tools="", toolbar_location=None, background_fill_color=None,
        border_fill_color=None, outline_line_color=None, min_border_right=12, **options,
    )  # fmt: skip
    for axis in plot.axis:
        axis.major_label_text_font_size, axis.axis_label_text_font_size = "12px", "12px"
        axis.major_label_text_font = axis.axis_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.minor_tick_line_color = None
    if rows is not None:
        plot.ygrid.grid_line_color = None
    return plot


def _first_sight(spans: Sequence[Span]) -> tuple[float, float]:
    """The stretch that a timeline shows before anybody zooms: where kernels were recorded, else the last few steps."""
    last = max((span.step for span in spans if span.step is not None), default=None)
    kernels = [span for span in spans if span.track == "kernels"]
    shown = kernels or [span for span in spans if last is None or (span.step is not None and span.step > last - SHOWN)]
    begin, end = min(span.begin for span in shown), max(span.begin + span.seconds for span in shown)
    return begin - 0.01 * (end - begin), end + 0.01 * (end - begin)


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else f"{name[: length - 3]}..."
