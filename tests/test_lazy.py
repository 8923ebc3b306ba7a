"""Packages that import their names when they are used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lit_fast import lazy


def test_a_name_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lazy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "place.py").write_text("class Kind: ...\n")
    (package / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_package  # type: ignore[import-not-found]

    home = {"Kind": "place"}
    kind = lazy.find("lazy_package", home, "Kind")
    assert kind.__module__ == "lazy_package.place" and vars(lazy_package)["Kind"] is kind
    assert lazy.find("lazy_package", {}, "other") is sys.modules["lazy_package.other"]
    for missing in ("nothing", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"'lazy_package' has no attribute '{missing}'"):
            lazy.find("lazy_package", home, missing)
