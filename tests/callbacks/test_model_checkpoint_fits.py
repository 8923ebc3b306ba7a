"""ModelCheckpoint in whole fits leaves what Lightning's leaves: live where Lightning is installed, else the record."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoint_fits import FITS, outcome

GOLDEN = Path(__file__).parents[1] / "goldens" / "model_checkpoint_lightning_2_6_6.json"
RECORDED: dict[str, Any] = json.loads(GOLDEN.read_text())

# A save that waits for its score is dropped by Lightning where epochs save at their own end; here the validation
# makes it, as it does for every other epoch.
SAVED_HERE_ONLY = {"time_and_score": "checkpoints/epoch=0-step=4.ckpt"}


@pytest.fixture(scope="session")
def lightning() -> dict[str, Any]:
    """What Lightning leaves."""
    if importlib.util.find_spec("lightning") is None:
        return RECORDED
    program = [sys.executable, str(Path(__file__).with_name("model_checkpoint_fits.py"))]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_every_fit_is_recorded() -> None:
    assert list(RECORDED) == list(FITS)


def test_the_record_is_what_lightning_does(lightning: dict[str, Any]) -> None:
    if lightning is RECORDED:
        pytest.skip("Lightning is not installed here")
    assert lightning == RECORDED


@pytest.mark.parametrize("name", FITS)
def test_leaves_what_lightning_leaves(name: str, lightning: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(outcome(name, "lit_fast.pytorch")))
    if name in SAVED_HERE_ONLY:
        path = SAVED_HERE_ONLY[name]
        assert ours["files"].pop(path) == 4
        best = ours["states"][0]["best_k_models"]
        ours["states"][0]["best_k_models"] = best.replace(f"'/{path}': tensor(3.), ", "")
    assert ours == lightning[name]
