"""Colours of the page by computation: contrast by WCAG, and what is left of a difference without red, green or blue."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from lit_fast.profiler.record import PHASES
from lit_fast.profiler.report import charts, elements, palette

# Machado, Oliveira and Fernandes (2009), https://doi.org/10.1109/TVCG.2009.113, severity 1.0, on linear RGB.
SEEN = {
    "everybody": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
JUST_NOTICEABLE = 2.3  # of CIE's L*a*b* differences (1976); side by side, and not small
TOLD_APART = 8 * JUST_NOTICEABLE
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ @ np.ones(3)


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    t = (XYZ @ rgb.clip(0.0, 1.0)) / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(a: str, b: str, seen: np.ndarray) -> float:
    return float(np.linalg.norm(lab(seen @ linear(a)) - lab(seen @ linear(b))))


def contrast(a: str, b: str) -> float:
    """By WCAG 2.1, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    light, dark = sorted((float(XYZ[1] @ linear(colour)) for colour in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def theme(selector: str) -> dict[str, str]:
    css = (Path(palette.__file__).parent / "page.css").read_text()
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css[css.index(selector) :].partition("}")[0]))


THEMES = {"light": theme(":root {"), "dark": theme(':root[data-theme="dark"] {')}


def test_the_measures_are_right() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0, rel=1e-3)
    assert difference("#000000", "#ffffff", SEEN["everybody"]) == pytest.approx(100.0, rel=1e-3)
    assert difference("#ff0000", "#807000", SEEN["protanopia"]) < difference("#ff0000", "#807000", np.eye(3)) / 2


@pytest.mark.parametrize("name", THEMES)
def test_text_can_be_read(name: str) -> None:
    colours = THEMES[name]
    for text in ("text", "soft", "accent", "warm"):
        for ground in ("card", "page"):
            assert contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}: WCAG's AA asks for 4.5"
    assert theme(":root:not(")["text"] == THEMES["dark"]["text"], "what the system prefers looks as the button's"


@pytest.mark.parametrize("name", THEMES)
def test_what_is_drawn_stands_out_from_the_page(name: str) -> None:
    """WCAG asks for 3 of graphics: of a bar's fill, or of the edge around it."""
    card = THEMES[name]["card"]
    assert contrast(palette.EDGE, card) >= 3.0
    for line in (palette.BLUE, palette.VERMILION, palette.GREY, THEMES[name]["bar"]):
        assert contrast(line, card) >= 3.0


def test_white_on_the_bars_that_hold_their_text() -> None:
    for ground in (palette.BLUE, "#5B6470"):
        assert contrast("#ffffff", ground) >= 4.5


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("looks", [palette.PHASES, palette.MEMORY, charts.TRACKS], ids=["phases", "memory", "tracks"])
def test_what_has_the_same_hatch_has_colours_that_are_told_apart(looks: dict[str, tuple[str, str]], seen: str) -> None:
    for (a, (colour, hatch)), (b, (other, hatch_of_other)) in itertools.combinations(looks.items(), 2):
        if hatch == hatch_of_other:
            assert difference(colour, other, SEEN[seen]) >= TOLD_APART, f"{a} and {b}"


@pytest.mark.parametrize("seen", SEEN)
def test_more_and_less_are_told_apart(seen: str) -> None:
    strong = palette.diverging()
    assert difference(strong[0][:7], strong[-1][:7], SEEN[seen]) >= TOLD_APART


def test_a_hatch_can_be_seen_and_stands_in_the_key() -> None:
    for colour, hatch in [*palette.PHASES.values(), *palette.MEMORY.values(), palette.OTHER]:
        assert contrast(palette.ink(colour), colour) >= 2.9
        assert hatch == " " or hatch in elements.HATCHES


def test_every_phase_has_a_look_of_its_own() -> None:
    assert list(palette.PHASES) == list(PHASES)
    for looks in (palette.PHASES, palette.MEMORY):
        assert len(set(looks.values())) == len(looks)
