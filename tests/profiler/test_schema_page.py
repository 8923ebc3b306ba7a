"""The manual's tables of the schema are those of record.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lit_fast.profiler import record

PAGE = Path(__file__).parents[2] / "docs" / "profiler.md"
CLASSES = [
    value for value in vars(record).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == record.__name__
]  # fmt: skip


def row(kind: type) -> str:
    """The line of the table that belongs to a dataclass.

    >>> row(record.Sync)
    '| `Sync` | where, line, calls, seconds |'
    """
    return f"| `{kind.__name__}` | {', '.join(each.name for each in dataclasses.fields(kind))} |"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_in_the_manual(kind: type) -> None:
    assert row(kind) in PAGE.read_text().splitlines(), f"the line should be: {row(kind)}"


def test_the_manual_has_no_other_objects() -> None:
    named = re.findall(r"^\| `(\w+)` \| [\w, ]+ \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(kind.__name__ for kind in CLASSES)


def test_every_phase_is_in_the_manual() -> None:
    assert ", ".join(record.PHASES) in " ".join(PAGE.read_text().split())
