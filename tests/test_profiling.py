"""The published comparison: its table and picture say what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from profiling import __main__ as published
from profiling import drawing

ROOT = Path(__file__).parents[1]


def result(ratio: float) -> dict[str, Any]:
    return {
        "date": "2026-01-02", "hardware": "a machine", "threads": 1, "versions": {"torch": "2.13"}, "windows": 20,
        "steps": 5, "loss_difference": 2e-7,
        "rows": {
            "data": [0.0001, 0.0001, 1.0, 0.9, 1.1],
            "forward": [0.0005, 0.0004, 0.8, 0.7, 0.9],
            "hooks": [0.0, 0.0001, None, None, None],
            "step": [0.0012345, 0.0012345 * ratio, ratio, ratio - 0.02, ratio + 0.02],
        },
    }  # fmt: skip


def test_the_table_stands_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{published.BEGIN}\nold\n{published.END}\nbelow\n")
    monkeypatch.setattr(published, "README", readme)
    for _ in range(2):
        published.write_table({"mlp": result(0.5), "cnn": result(1.25)})
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    row = "| [MLP, 3K parameters](mlp.py) | 1.23 ms | 617 us | **0.50** (0.48 to 0.52) | 0.80 |  |  | 2e-07 |"
    assert text.count(row) == 1
    assert "a machine, torch 2.13, 1 thread(s), 2026-01-02." in text


def test_the_picture_has_a_bar_for_each_phase_and_the_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing, "DRAWING", tmp_path / "profile.svg")
    drawing.draw({"one, small": result(0.5), "two": result(1.25)})
    svg = (tmp_path / "profile.svg").read_text()
    assert "lit_fast  0.50 (0.48 to 0.52)" in svg and "eager  1.23 ms" in svg
    assert all(phase in svg for phase in drawing.PHASES)


def test_every_program_is_there_and_says_how_it_is_run() -> None:
    for name in published.PROGRAMS:
        text = (ROOT / "profiling" / f"{name}.py").read_text()
        assert re.search(rf"^lit-fast profile -m profiling\.{name} --against eager", text, re.MULTILINE)


def test_unknown_programs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        published.main(["nothing"])
    assert stop.value.code == 2 and "allowed are mlp" in capsys.readouterr().err
