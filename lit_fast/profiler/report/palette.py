"""Colours that people tell apart who do not see red, green or blue, each phase with a hatch of its own as well.

Source of the colours: Okabe and Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8F98"

# phase: colour and Bokeh's hatch pattern. No two phases share both.
PHASES: dict[str, tuple[str, str]] = {
    "setup": (GREY, "x"),
    "data": (ORANGE, " "),
    "transfer": (YELLOW, " "),
    "forward": (SKY, " "),
    "backward": (BLUE, " "),
    "communication": (VERMILION, " "),
    "optimizer": (GREEN, " "),
    "schedulers": (GREEN, "/"),
    "hooks": (PURPLE, " "),
    "logging": (PURPLE, "/"),
    "checkpoint": (ORANGE, "x"),
    "validation": (SKY, "/"),
    "loop": (BLUE, "/"),
    "profiling": (YELLOW, "/"),
    "idle": (GREY, "-"),
    "unexplained": (GREY, "/"),
}
OTHER = (GREY, ".")
MEMORY = {
    "parameters": (BLUE, " "),
    "gradients": (SKY, "/"),
    "optimizer": (GREEN, " "),
    "activations": (ORANGE, "/"),
    "other": (GREY, " "),
}


def of_phase(name: str) -> tuple[str, str]:
    return PHASES.get(name, OTHER)


def diverging(count: int = 129) -> list[str]:
    """From blue (less) over nothing, which is the page itself, light or dark, to vermilion (more)."""
    half = count // 2
    return [f"{BLUE if i < half else VERMILION}{round(255 * abs(i - half) / half):02x}" for i in range(count)]
