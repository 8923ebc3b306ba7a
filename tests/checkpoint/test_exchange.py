"""Checkpoints of Lightning 2.6.6 go on here, and ours there, with the very losses, weights, counters and states.

At an epoch's end both frameworks go on alike. Inside an epoch Lightning begins the data anew and takes as many batches
as were left; we take the batches that were left, as an uninterrupted run does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import exchange_program as exchange
import pytest
import torch

RECORDED = json.loads((exchange.GOLDENS / "exchange.json").read_text())
LIGHTNING = sys.executable if importlib.util.find_spec("lightning") else os.environ.get("LIGHTNING_PYTHON")
INSIDE = ("batch", "validation")  # points inside of an epoch


def close(ours: Any, theirs: Any, eps: float) -> None:
    """Numbers may differ by the rounding of some 40 steps; names, counters and everything else are equal."""
    if isinstance(theirs, float) and eps:
        assert abs(ours - theirs) <= 40 * 8 * eps * max(abs(theirs), 1e-2)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, eps)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            try:
                close(ours[key], theirs[key], eps)
            except AssertionError as error:
                raise AssertionError(f"{key}: ours {ours[key]}, theirs {theirs[key]}") from error
    else:
        assert ours == theirs


def expected(name: str, writer: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What Lightning does, but for what we know better; each line says why."""
    case, point = name.split("-")
    if point in INSIDE:  # it goes on with other batches
        kept: tuple[str, ...] = ("global_step", "current_epoch", "rows_given", "total_batch_idx")
        if case == "schedule":  # and, for the rest of that epoch, with windows of one batch
            kept = kept[1:]
        return {**ours, **({key: theirs[key] for key in kept} if "error" not in theirs else {})}
    if "error" in theirs or (point == "epoch_start" and writer == "lightning"):
        return ours  # EarlyStopping finds no metric, or a whole epoch is lost
    if name == "schedule-last_batch":
        return ours  # no epoch starts for it, so its scheduler sets no window, and the next epoch has windows of one
    if (name, writer) == ("plateau-last_batch", "lightning"):
        # the metric that the scheduler waits for is not in the file; Lightning leaves out the next epoch's, too
        return {**theirs, "schedulers": [theirs["schedulers"][0] + 1]}
    if case == "plateau" and writer == "lit_fast":
        return {**theirs, "schedulers": ours["schedulers"]}  # our files hold that metric
    if (name, writer) == ("accumulate-last_batch", "lit_fast"):
        # the validation that was due after that batch: we run it, Lightning leaves it out
        return {**theirs, **{key: ours[key] for key in ("top_k", "kth_value", "best_score", "best")}}
    return theirs


def check(name: str, writer: str, ours: dict[str, Any], theirs: dict[str, Any], whole: list[Any], eps: float) -> None:
    assert "error" not in ours, ours
    if not name.endswith("-end"):  # there, more epochs follow than the whole run had
        close(ours["steps"], whole[len(whole) - len(ours["steps"]) :], eps)
    if not name.startswith("manual"):
        assert ours["batches_that_stepped"] == ours["global_step"]
    close(ours, expected(name, writer, theirs, ours), eps)


@pytest.mark.parametrize("name", exchange.STORED)
def test_goes_on_from_a_stored_file_of_lightnings(name: str, tmp_path: Path) -> None:
    held = torch.load(exchange.GOLDENS / f"exchange-{name}.ckpt", weights_only=True)
    file = tmp_path / f"{name}.ckpt"
    torch.save(exchange.moved(held, exchange.ELSEWHERE, str(tmp_path)), file)
    ours = exchange.quietly("lit_fast", name.split("-")[0], tmp_path, str(file))
    theirs, whole = RECORDED["resumed"][name], RECORDED["whole"][name.split("-")[0]]
    check(name, "lightning", ours, theirs, whole, torch.finfo(torch.float32).eps)


def lightning(*arguments: str) -> dict[str, Any]:
    program = [str(LIGHTNING), str(Path(exchange.__file__)), "lightning", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case saved by both frameworks, and gone on with by Lightning."""
    if LIGHTNING is None:
        pytest.skip("Lightning is not installed here; LIGHTNING_PYTHON may name an interpreter that has it")
    theirs, ours = tmp_path_factory.mktemp("lightning"), tmp_path_factory.mktemp("lit_fast")
    cases = list(exchange.TRAINER)
    whole = {
        "lightning": lightning("save", str(theirs), *cases),
        "lit_fast": {case: exchange.quietly("lit_fast", case, ours) for case in cases},
    }
    files = {folder: sorted(map(str, folder.glob("*-*.ckpt"))) for folder in (theirs, ours)}
    return {
        "whole": {who: {case: row["steps"] for case, row in rows.items()} for who, rows in whole.items()},
        "lightning": lightning("go_on", str(theirs), *files[theirs]),
        "lit_fast": lightning("go_on", str(ours), *files[ours]),
        "folders": {"lightning": theirs, "lit_fast": ours},
    }


@pytest.mark.parametrize("writer", ["lightning", "lit_fast"])
@pytest.mark.parametrize("case", exchange.TRAINER)
def test_goes_on_as_lightning_does(case: str, writer: str, folders: dict[str, Any]) -> None:
    for point in exchange.POINTS:
        name, folder = f"{case}-{point}", folders["folders"][writer]
        ours = exchange.quietly("lit_fast", case, folder, f"{folder}/{name}.ckpt")
        check(name, writer, ours, folders[writer][name], folders["whole"][writer][case], eps=0.0)
