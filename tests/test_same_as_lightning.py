"""200 steps under lit_fast against the same 200 steps under Lightning 2.6.6: losses and weights are equal to the bit.

The record in goldens/ was made on x86-64 with AVX2 and torch 2.13, one thread; where Lightning can be imported it is
made anew, here and now. Bits are promised on one kind of machine only: elsewhere torch's own kernels round otherwise,
and the losses are compared within what that can amount to.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_losses
import pytest
import torch

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "goldens" / "losses_lightning_2_6_6.json").read_text())


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Lightning's record: made now where it is installed."""
    if importlib.util.find_spec("lightning") is None:
        return GOLDEN
    out = tmp_path_factory.mktemp("live") / "losses.json"
    program = [sys.executable, str(HERE / "lightning_losses.py"), "lightning", "--out", str(out)]
    subprocess.run(program, check=True)
    made: dict[str, Any] = json.loads(out.read_text())
    return made


def test_the_record_has_every_program() -> None:
    assert list(GOLDEN["records"]) == lightning_losses.NAMES


@pytest.mark.parametrize("name", lightning_losses.NAMES)
def test_losses_and_weights(name: str, recorded: dict[str, Any]) -> None:
    theirs, ours = recorded["records"][name], lightning_losses.run("lit_fast", name)
    if recorded["machine"] == lightning_losses.machine() and name != "rmsprop":  # torch's root there: MKL's, see docs
        assert ours == theirs
        return
    expected, found = lightning_losses.floats(theirs, name), lightning_losses.floats(ours, name)
    assert len(found) == len(expected)
    # A first loss has seen no update: its reduction over n = 160 products differs by n roundings at most. Later ones
    # carry the differences of all updates before them, which training need not damp, so only the first is bounded.
    eps = {"double": torch.finfo(torch.float64).eps, "float16": torch.finfo(torch.float16).eps}
    bound = 160 * eps.get(name, torch.finfo(torch.float32).eps)
    assert abs(found[0] - expected[0]) <= bound * max(abs(expected[0]), 1.0)
    assert all(map(math.isfinite, found)) == all(map(math.isfinite, expected))
