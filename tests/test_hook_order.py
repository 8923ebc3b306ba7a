"""lit_fast beside Lightning 2.6.6, scenario by scenario: hooks, logged values, checkpoint files, losses.

goldens/lightning_2_6_6*.json were written by lightning_recorder.py under Lightning. Where Lightning itself can
be imported, it is recorded anew in a process of its own, and numbers must then be equal to the last bit.

Where the two differ on purpose, INTENDED names it and says how Lightning's record is read for the comparison.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_recorder
import pytest
import torch

HERE = Path(__file__).parent
GOLDENS = [json.loads(path.read_text()) for path in sorted((HERE / "goldens").glob("lightning_2_6_6*.json"))]
GOLDEN: dict[str, Any] = {**GOLDENS[0], "scenarios": {k: v for g in GOLDENS for k, v in g["scenarios"].items()}}
NAMES = list(GOLDEN["scenarios"])

INTENDED = {
    "logged_step": "the step number given to a logger is the number of optimizer steps completed (50, 100, "
    "...); Lightning writes one less (49, 99, ...); the running number of validation batches is the same",
    "uneven_window": "the last, shorter accumulation window is divided by its real length",
    "open_window": "a checkpoint written inside an accumulation window holds the gradients gathered so far, and a "
    "resumed run has them; Lightning loses them, and steps with the rest of the window alone",
    "rounding": "Adam rounds as torch's fused one, which Lightning's programs do not ask for by default; weights in 16 "
    "bits are updated in float32 and rounded once",
    "more_keys": "our checkpoints hold every key of Lightning's, and more (random states, place in the data)",
}


def as_ours(name: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """Lightning's record with the intended difference `logged_step` applied."""
    out = dict(theirs)
    if "logged" in theirs:
        rows = []
        for row in theirs["logged"]:
            counts_optimizer_steps = "epoch" in row["metrics"]  # a step that was logged, or counted, has no epoch
            during_fit = not name.startswith(("validate", "test", "predict"))
            shift = 1 if counts_optimizer_steps and during_fit else 0
            rows.append({**row, "step": row["step"] + shift})
        out["logged"] = rows
    return out


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any] | None:
    """Lightning's record made now, or None where Lightning is not installed."""
    if importlib.util.find_spec("lightning") is None:
        return None
    out = tmp_path_factory.mktemp("live") / "lightning.json"
    program = [
        sys.executable,
        str(HERE / "lightning_recorder.py"),
        "--framework",
        "lightning",
        "--out",
        str(out),
    ]
    subprocess.run(program, check=True)
    recorded: dict[str, Any] = json.loads(out.read_text())
    return recorded


@pytest.fixture(scope="session")
def framework() -> lightning_recorder.Framework:
    return lightning_recorder.Framework("lit_fast")


def text_diff(theirs: list[str], ours: list[str]) -> str:
    rows = list(difflib.unified_diff(theirs, ours, "Lightning", "lit_fast", n=3, lineterm=""))
    more = f"\n... {len(rows) - 60} more lines" if len(rows) > 60 else ""
    return "\n".join(rows[:60]) + more


def lines(value: Any) -> list[str]:
    return json.dumps(value, indent=1, sort_keys=True).splitlines()


def assert_same(theirs: Any, ours: Any) -> None:
    if theirs != ours:
        pytest.fail("\n" + text_diff(lines(theirs), lines(ours)), pytrace=False)


def assert_floats(theirs: list[float], ours: list[float], eps: float) -> None:
    """Value i is the outcome of at most i + 1 steps, each of a handful of operations rounded to `eps`."""
    assert len(theirs) == len(ours)
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert abs(a - b) <= 8 * eps * (index + 1) * max(abs(a), abs(b)), f"value {index}: Lightning {a}, ours {b}"


def missing(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """Paths in Lightning's nested record that are absent or different in ours; ours may hold more."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        absent = [f"{at}.{key} is missing" for key in theirs if key not in ours]
        return absent + [p for key in theirs if key in ours for p in missing(theirs[key], ours[key], f"{at}.{key}")]
    return [] if theirs == ours else [f"{at}: Lightning {theirs!r}, ours {ours!r}"]


@pytest.mark.parametrize("name", NAMES)
def test_same_as_lightning(name: str, framework: lightning_recorder.Framework, live: dict[str, Any] | None) -> None:
    recorded = (live or GOLDEN)["scenarios"][name]
    theirs = as_ours(name, recorded)
    ours = json.loads(json.dumps(lightning_recorder.run_scenario(framework, name)))
    if name == "resume_mid_window":  # INTENDED["open_window"]
        for record in (theirs, ours):
            record["events"] = [event.removesuffix(" grads") for event in record["events"]]
    if theirs["events"] != ours["events"]:
        pytest.fail("\n" + text_diff(theirs["events"], ours["events"]), pytrace=False)
    for part in ("logged", "seen"):
        assert_same(theirs.get(part, []), ours.get(part, []))
    if name in ("checkpoint_keys", "model_checkpoint_files"):  # INTENDED["more_keys"]
        for facts in (theirs["facts"], ours["facts"]):
            for row in (facts, *(v for v in facts.values() if isinstance(v, dict))):
                for key in ("keys", "state_keys"):
                    if isinstance(row.get(key), list):
                        row[key] = dict.fromkeys(row[key])
        assert missing(theirs["facts"], ours["facts"]) == []
    else:
        assert_same(theirs.get("facts", {}), ours.get("facts", {}))
    if name == "losses_sgd_accumulate_uneven":
        return  # INTENDED["uneven_window"]; test_uneven_window_is_divided_by_its_length has the truth
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    rounds_alike = name not in ("losses_adam_clip_norm", "losses_bf16_true")  # INTENDED["rounding"]
    eps = 0.0 if live is not None and rounds_alike else torch.finfo(dtype).eps
    for part in ("losses", "grad_norms"):
        assert_floats(theirs.get(part, []), ours.get(part, []), eps)


def hand_written_losses(divide_by_window: bool) -> list[float]:
    """The scenario losses_sgd_accumulate_uneven without any trainer: 7 batches an epoch in windows of 2."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        for index, batch in enumerate(lightning_recorder.loader(7, seed=3)):
            loss = (torch.tanh(layer(batch)) - batch[:, :2]).square().mean()
            losses.append(loss.item())
            window = 1 if index == 6 and divide_by_window else 2
            if index % 2 == 0:
                optimizer.zero_grad()
            (loss / window).backward()
            if index % 2 == 1 or index == 6:
                optimizer.step()
    return losses


def test_uneven_window_is_divided_by_its_length(framework: lightning_recorder.Framework) -> None:
    name = "losses_sgd_accumulate_uneven"
    eps = torch.finfo(torch.float32).eps
    assert_floats(GOLDEN["scenarios"][name]["losses"], hand_written_losses(divide_by_window=False), eps)
    ours = lightning_recorder.run_scenario(framework, name)["losses"]
    assert ours == hand_written_losses(divide_by_window=True)


def test_golden_is_what_lightning_does(live: dict[str, Any] | None) -> None:
    if live is None:
        pytest.skip("Lightning is not installed here")
    if live["version"] != GOLDEN["version"]:
        pytest.skip(f"Lightning {live['version']} is installed, the goldens are of {GOLDEN['version']}")
    assert sorted(live["scenarios"]) == sorted(NAMES)
    for name in NAMES:
        assert live["scenarios"][name]["events"] == GOLDEN["scenarios"][name]["events"], name


def test_every_scenario_has_a_golden() -> None:
    assert sorted(lightning_recorder.all_scenarios()) == sorted(NAMES)
