"""The page's building blocks as HTML; every text goes through `escape`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from lit_fast.profiler.report import palette

if TYPE_CHECKING:
    from lit_fast.profiler.report.charts import Chart

# Bokeh's patterns: classes of page.css
HATCHES = {"/": "slashed", "\\": "backslashed", "x": "crossed", "-": "lined", "|": "barred", ".": "dotted"}


def table(heads: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """A head that begins with "!" is of a column of words, with "!!" of sentences, both to the left; others of numbers.

    "-" is what is empty.
    """
    heads = list(heads)
    words = ["words long" if head.startswith("!!") else "words" if head.startswith("!") else "" for head in heads]
    top = "".join(
        f"<th{' class=words' if word else ''}>{escape(head.lstrip('!'))}</th>"
        for head, word in zip(heads, words, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{word}">{escape(cell or "-")}</td>' if word else f"<td>{escape(cell or '-')}</td>"
            for cell, word in zip(row, words, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return wide(f"<table><tr>{top}</tr>{body}</table>")


def wide(content: str) -> str:
    """May be scrolled sideways on a phone, by keys too."""
    return f'<div class="wide" tabindex="0">{content}</div>'


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows)}</dl>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def drawn(name: str, charts: dict[str, Chart], divs: dict[str, str]) -> str:
    """A chart's place, and its key as buttons: they wrap on a phone and can be reached without a mouse."""
    if name not in charts:
        return ""
    keys = "".join(
        f'<button type="button" class="key" aria-pressed="true" data-renderer="{escape(key.renderer)}">'
        f'<i class="{HATCHES.get(key.hatch, "")}" style="--swatch:{key.colour};--ink:{palette.ink(key.colour)}"></i>'
        f"{escape(key.name)}</button>"
        for key in charts[name].keys
    )
    return f'<div class="chart">{divs[name]}</div>' + (f'<div class="keys">{keys}</div>' if keys else "")
