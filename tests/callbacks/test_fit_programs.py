"""EarlyStopping, Timer, LearningRateMonitor, LambdaCallback and callbacks of one's own in fits: as in Lightning."""

from __future__ import annotations

import json

import monitor_programs  # noqa: F401
import pytest
import stopping_programs  # noqa: F401
from fit_programs import GOLDENS, PROGRAMS, run

ROWS = json.loads(GOLDENS.read_text())


def test_every_program_is_recorded() -> None:
    assert sorted(ROWS) == sorted(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_gives_what_lightning_gave(name: str) -> None:
    assert run(name, "lit_fast.pytorch") == ROWS[name]
