"""Callbacks that change training: the same programs give what Lightning gave, number by number."""

from __future__ import annotations

import json

import pytest
from callback_programs import GOLDENS, PROGRAMS, run

ROWS = json.loads(GOLDENS.read_text())


def test_every_program_is_recorded() -> None:
    assert list(ROWS) == list(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_gives_what_lightning_gave(name: str) -> None:
    assert run(name, "lit_fast.pytorch") == ROWS[name]
