"""docs/profile.svg: a step of each program in eager PyTorch and under lit_fast, by phase. matplotlib draws."""

from __future__ import annotations

from typing import Any

from benchmarks.curves_drawing import GRID, INK, PAPER, short, with_night
from benchmarks.harness import ROOT
from lit_fast.profiler.report.units import seconds

DRAWING = ROOT / "docs" / "profile.svg"
# Told apart by lightness and by hatching, not by hue alone; light enough by day and dark enough by night.
PHASES = {
    "data": ("#8c959f", "", ["data", "transfer"]),
    "forward": ("#56b4e9", "", ["forward"]),
    "backward": ("#0072b2", "//", ["backward"]),
    "optimizer": ("#e69f00", "", ["optimizer"]),
    "the rest": ("#cc79a7", "xx", []),  # every other row
}
HEIGHT, BESIDE = 0.34, 0.38  # of a bar, and from the eager bar to ours


def draw(results: dict[str, Any]) -> None:
    """Bars as shares of the eager step, which lasts from 1e-4 to 10 s; its length is written beside."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": "lit_fast",
        "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "font.size": 9,
        "hatch.linewidth": 0.6,
        "hatch.color": PAPER,
        "axes.edgecolor": GRID,
        "axes.facecolor": PAPER,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.5, 0.72 * len(results) + 1.1), layout="constrained", facecolor=PAPER)
        FigureCanvasSVG(figure)
        field = figure.add_subplot()
        for place, result in enumerate(results.values()):
            whole, _, ratio, low, high = result["rows"]["step"]
            named = {part for _, _, parts in PHASES.values() for part in parts}
            rest = [part for part in result["rows"] if part != "step" and part not in named]
            for side, (offset, who) in enumerate(((0.0, "eager"), (BESIDE, "lit_fast"))):
                left = 0.0
                for phase, (color, hatch, parts) in PHASES.items():
                    width = sum(result["rows"][part][side] for part in parts or rest if part in result["rows"]) / whole
                    label = phase if not place and not side else None
                    field.barh(place + offset, width, HEIGHT, left, color=color, hatch=hatch, lw=0, label=label)
                    left += width
                said = seconds(whole) if not side else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
                field.text(left + 0.01, place + offset, f"{who}  {said}", va="center", fontsize=8)
        field.set_yticks(
            [place + BESIDE / 2 for place in range(len(results))], [name.replace(", ", "\n", 1) for name in results]
        )
        field.set_xlim(0.0, 1.3)
        field.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
        field.set_xlabel("time of a step, as a share of eager's")
        field.tick_params(length=0)
        field.invert_yaxis()
        field.spines[["top", "right", "left"]].set_visible(False)
        field.legend(ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, handlelength=1.5)
        figure.savefig(
            DRAWING, metadata={"Date": None, "Creator": None, "Title": "A step in eager PyTorch and lit_fast"}
        )
    DRAWING.write_text(with_night(short(DRAWING.read_text())))
