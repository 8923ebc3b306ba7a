"""Every Python example of the README and the manual runs as it stands, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[pytest.ParameterSet]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 2
            found.append(pytest.param(page, line, match[1], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize(("page", "line", "code"), examples())
def test_example_runs(page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "README.md" and "for batch in loader" in code:
        pytest.skip("a fragment: it needs the reader's own model, loss and loader")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)  # line numbers as in the page
    assert len(names) > 2, "the example defined nothing"


def test_every_guide_has_an_example_or_a_table() -> None:
    """A page of prose alone is one that nobody can check."""
    for page in PAGES:
        text = page.read_text()
        assert BLOCK.search(text) or re.search(r"^\|", text, re.MULTILINE), page
