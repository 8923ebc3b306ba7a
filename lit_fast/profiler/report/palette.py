"""Colours that people tell apart who do not see red, green or blue, each phase with a hatch of its own as well.

Source of the colours: Okabe and Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8F98"

EDGE = "#6b7480"  # around what is filled: yellow on white, and blue on black, have little contrast of their own

# phase: colour and Bokeh's hatch pattern. Those with the same hatch have colours that also people tell apart who do not
# see red, green or blue; tests/profiler/report/test_palette.py computes it.
PHASES: dict[str, tuple[str, str]] = {
    "setup": (GREY, " "),
    "data": (ORANGE, " "),
    "transfer": (YELLOW, "/"),
    "forward": (SKY, " "),
    "backward": (BLUE, " "),
    "communication": (VERMILION, "/"),
    "optimizer": (GREEN, "x"),
    "schedulers": (GREEN, "."),
    "hooks": (PURPLE, "/"),
    "logging": (PURPLE, "-"),
    "checkpoint": (ORANGE, "x"),
    "validation": (SKY, "/"),
    "loop": (BLUE, "/"),
    "profiling": (YELLOW, "-"),
    "idle": (GREY, "|"),
    "unexplained": (GREY, "\\"),
}
OTHER = (GREY, ".")
MEMORY = {
    "parameters": (BLUE, " "),
    "gradients": (SKY, "/"),
    "optimizer": (GREEN, "x"),
    "activations": (ORANGE, "/"),
    "other": (GREY, " "),
}


def ink(colour: str) -> str:
    """Of a hatch on that colour."""
    return "#1c1f24" if colour in (ORANGE, SKY, YELLOW) else "#ffffff"


def of_phase(name: str) -> tuple[str, str]:
    return PHASES.get(name, OTHER)


def diverging(count: int = 129) -> list[str]:
    """From blue (less) over nothing, which is the page itself, light or dark, to vermilion (more)."""
    half = count // 2
    return [f"{BLUE if i < half else VERMILION}{round(255 * abs(i - half) / half):02x}" for i in range(count)]
