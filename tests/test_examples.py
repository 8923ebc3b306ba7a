"""Every program of `examples/` learns what it says, with a small budget; pretrain.py is run by tests/cli."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_fast import compat

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the examples take their data from scikit-learn"
)

EXAMPLES = Path(__file__).parent.parent / "examples"

# Budget, and what the figures of that budget must be: below (<) or above (>) the number. Guessing gives 0.1 accuracy
# on digits and 0.5 on spirals; a mean squared error of standardized data that nothing was learned from is 1.
LEARNED: dict[str, tuple[list[str], dict[str, tuple[str, float]]]] = {
    "autoencoder": (["--max_epochs=6"], {"val_mse": ("<", 0.055)}),  # the variance of the pixels is 0.072
    "averaged_weights": (["--max_epochs=4"], {"val_accuracy": (">", 0.8)}),
    "char_gpt": (["--max_epochs=8"], {"val_loss": ("<", 1.5)}),  # ln 13 = 2.56 at first
    "digits_classifier": (["--max_epochs=4"], {"test_accuracy": (">", 0.85)}),
    "finetune": (["--max_epochs=12"], {"pretrained": (">", 0.85), "fine_tuned": (">", 0.5)}),
    "gan": (["--max_epochs=8"], {"distance_to_ring": ("<", 0.5)}),
    "lightning_program": (["--max_epochs=6"], {"val_accuracy": (">", 0.75)}),
    "multi_task": (["--max_epochs=6"], {"val_accuracy": (">", 0.7), "val_ink_mse": ("<", 0.75)}),
    "own_loop": (["--max_epochs=4"], {"accuracy": (">", 0.8), "compiled": (">", 0.5)}),
    "ppo": (["--max_epochs=5"], {"episode_length": (">", 28)}),  # 17 to 22 at random
    "predict_to_files": (["--max_epochs=3"], {"accuracy": (">", 0.7), "predictions": (">", 296)}),
    "tabular_regression": (["--max_epochs=6"], {"val_mse": ("<", 0.65)}),
    "time_series": (["--max_epochs=2"], {"val_mse": ("<", 0.05)}),
}


@pytest.fixture
def lightning_is_lit_fast() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


def test_every_example_is_run_and_listed() -> None:
    programs = {path.stem for path in EXAMPLES.glob("*.py")}
    assert programs - {"pretrain"} == set(LEARNED)
    listed = (EXAMPLES / "README.md").read_text()
    assert not [name for name in programs if f"[{name}.py]({name}.py)" not in listed]
    assert not [path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) >= 150]


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_it_learns(name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lightning_program":
        if "lightning" in sys.modules:
            pytest.skip("Lightning itself is imported in this process")
        request.getfixturevalue("lightning_is_lit_fast")
    monkeypatch.chdir(tmp_path)  # logs, checkpoints and predictions
    argv, bounds = LEARNED[name]
    figures: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](argv)
    for figure, (sign, bound) in bounds.items():
        value = figures[figure]
        assert value < bound if sign == "<" else value > bound, f"{figure} = {value}, not {sign} {bound}"
