"""The public surface, and what importing it costs: nothing beyond torch until a name is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lit_fast
import lit_fast.pytorch

HEAVY = tuple("rich tensorboard torchmetrics jsonargparse tokenizers matplotlib yaml triton lightning".split())


def in_order(names: list[str]) -> list[str]:
    """As ruff sorts them: ALL CAPITALS, then Classes, then functions."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def in_new_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_public_names_are_sorted_and_there() -> None:
    assert lit_fast.__all__ == [
        "Callback",
        "LightningDataModule",
        "LightningModule",
        "Trainer",
        "seed_everything",
    ]
    assert lit_fast.pytorch.__all__ == lit_fast.__all__
    for package in (lit_fast, lit_fast.pytorch):
        assert package.__all__ == in_order(package.__all__)
        for name in package.__all__:
            assert getattr(package, name) is getattr(lit_fast, name)
            assert name in dir(package)


@pytest.mark.parametrize("room", ["callbacks", "checkpoint", "data", "loggers", "models", "optim", "strategies"])
def test_each_room_has_sorted_names_that_exist(room: str) -> None:
    package = getattr(lit_fast, room)
    assert package.__all__ == in_order(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"'Trainor'.*Trainer"):
        _ = lit_fast.Trainor


def test_importing_the_package_imports_nothing_else() -> None:
    program = """
import json, sys
before = set(sys.modules)
import lit_fast
print(json.dumps(sorted(m for m in set(sys.modules) - before if "lit_fast" in m or m == "torch")))
"""
    assert json.loads(in_new_process(program)) == ["lit_fast"]


def test_trainer_and_module_import_nothing_heavy() -> None:
    program = f"""
import json, sys
import torch
before = set(sys.modules)
import lit_fast
all(getattr(lit_fast, name) for name in lit_fast.__all__)
import lit_fast.pytorch.callbacks, lit_fast.ops, lit_fast.optim, lit_fast.triton
new = {{m.partition(".")[0] for m in set(sys.modules) - before}}
print(json.dumps(sorted(new & set({HEAVY!r}))))
"""
    assert json.loads(in_new_process(program)) == []


def test_version_is_the_one_of_the_metadata(repository: Path) -> None:
    assert f'version = "{lit_fast.__version__}"' in (repository / "pyproject.toml").read_text()
