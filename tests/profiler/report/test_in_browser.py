"""The page in a browser: no error, no request, clicks that do something, light and dark, and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from test_html import EVIL, everything

from lit_fast.profiler.record import Part, Span
from lit_fast.profiler.report.html import write_html

pytestmark = pytest.mark.skipif(browser.found() is None, reason=f"no browser here: none of {', '.join(browser.NAMES)}")

DRAWN = "Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle"
AXIS = "[...Bokeh.documents[0]._all_models.values()].find(m => m.type === 'LinearAxis').major_label_text_color"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = everything()
    made = report.profiles[0]
    made.parts.append(Part("hooks", EVIL, 0.3, 200, EVIL))
    made.timeline.append(Span("hooks", EVIL, made.timeline[-1].begin, 1e-3))
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(report, path)
    return path


@pytest.fixture(scope="module")
def page(path: Path) -> Iterator[browser.Browser]:
    with browser.Browser(path) as opened:
        opened.until(DRAWN)
        yield opened


def test_it_opens_from_the_disk_without_an_error_or_a_request(page: browser.Browser, path: Path) -> None:
    assert page.console == []
    assert [address for address in page.requests if not address.startswith("data:")] == [path.resolve().as_uri()]
    assert page.run("window.evil") is None
    shown = "[...document.querySelectorAll('.chart')].map(c => c.getBoundingClientRect().height)"
    assert len(page.run(shown)) == 7 and min(page.run(shown)) > 150


def test_the_page_may_not_ask_for_anything(page: browser.Browser) -> None:
    """Its own policy forbids it, so that no name in a report can."""
    refused = page.run("fetch('https://example.com').then(() => 'came', error => 'refused')")
    assert refused == "refused" and any("Content Security Policy" in text for text in page.console)
    page.console.clear()


def test_a_click_in_the_key_hides_a_phase(page: browser.Browser) -> None:
    key = "[...document.querySelectorAll('#timeline .key')].find(b => b.textContent === 'backward')"
    bars = f"Bokeh.documents[0].get_model_by_id({key}.dataset.renderer)"
    assert page.run(f"{bars}.visible") is True
    for expected in (False, True):
        page.run(f"{key}.scrollIntoView({{block: 'center'}})")
        box = page.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({key}.getBoundingClientRect())")
        page.click(*box)
        page.until(f"{bars}.visible === {str(expected).lower()}")
        assert page.run(f"{key}.getAttribute('aria-pressed')") == str(expected).lower()
    assert page.console == []


def test_the_button_changes_light_and_dark_in_charts_too(page: browser.Browser, tmp_path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.run(ground), page.run(AXIS)
    page.run("scrollTo(0, 0)")
    x, y = page.run("(b => [b.x + b.width / 2, b.y + b.height / 2])(theme.getBoundingClientRect())")
    page.click(x, y)
    page.until("document.documentElement.dataset.theme === 'dark'")
    assert page.run(ground) != light[0] and page.run(AXIS) == "#e9ecf1" != light[1]
    page.click(x, y)
    page.until("document.documentElement.dataset.theme === 'light'")
    assert (page.run(ground), page.run(AXIS)) == light
    page.screenshot(tmp_path / "light.png")
    assert (tmp_path / "light.png").read_bytes().startswith(b"\x89PNG")


def test_dark_is_what_the_system_prefers_and_a_phone_needs_no_sideways_scrolling(path: Path) -> None:
    with browser.Browser(path, width=390, height=800, dark=True) as page:
        page.until(f"{DRAWN} && {AXIS} === '#e9ecf1'")
        assert page.run("document.documentElement.scrollWidth") <= 390
        edges = "[...document.querySelectorAll('.chart > *, section')].map(e => e.getBoundingClientRect().right)"
        assert max(page.run(edges)) <= 390
        assert page.console == []
