"""What validating costs, against the hand-written loop under `torch.no_grad` that has none of a trainer's features.

Linear(32, 2), 1,000 batches of 4 in memory, one thread; each step logs one value with `on_epoch=True`, and the hand
loop keeps the same mean, weighted by the batches' sizes. Timed is one validation inside a fit, from its first hook to
its last, so that nothing of the fit is in it. Lightning runs in a process of its own, beside its own hand-written
loop, and only ratios are compared.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Rounds, Row, Time
from benchmarks.step_overhead import make_loader

QUICK = True
BATCHES = 1000
HAND, VALIDATED, HOOKED = "hand loop", "one logged value", "one logged value, and a hook at each batch's end"


def hand_loop() -> None:
    import torch

    layer, total, count = torch.nn.Linear(32, 2), 0.0, 0
    layer.eval()
    with torch.no_grad():
        for batch in make_loader(BATCHES):
            loss = layer(batch).sum()
            total += loss.item() * len(batch)
            count += len(batch)
    assert total / count


def validated(framework: str, root: Path, hooked: bool) -> Callable[[], Time]:
    """Times one validation of a fit that trains on one batch."""
    import torch

    package = importlib.import_module("lightning.pytorch" if framework == "lightning" else "lit_fast.pytorch")

    class Model(package.LightningModule):  # type: ignore[name-defined,misc]
        begun = ended = Time(0.0, 0.0)

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            return loss

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("loss", self.layer(batch).sum(), on_epoch=True)

        def on_validation_start(self) -> None:
            self.begun = Time.now()

        def on_validation_end(self) -> None:
            self.ended = Time.now()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Hook(package.Callback):  # type: ignore[name-defined,misc]
        def on_validation_batch_end(self, *args: Any) -> None:
            """Called, no more."""

    def measure() -> Time:
        trainer = package.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=[Hook()] if hooked else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        model = Model()
        trainer.fit(model, make_loader(1), make_loader(BATCHES))
        return Time(model.ended.wall - model.begun.wall, model.ended.cpu - model.begun.cpu)

    return measure


def worker(framework: str, rounds: int) -> dict[str, float]:
    """Ratios of one framework to its own hand loop."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, harness.Measure] = {
            HAND: lambda: harness.elapsed(hand_loop),
            VALIDATED: validated(framework, Path(folder), hooked=False),
            HOOKED: validated(framework, Path(folder), hooked=True),
        }
        figures = Rounds(cases, rounds, warmup=2)
    by_step = 1e6 / BATCHES
    return {
        VALIDATED: figures.ratio(VALIDATED, HAND, cpu=True),
        HOOKED: figures.ratio(HOOKED, HAND, cpu=True),
        "added to a step": figures.difference(VALIDATED, HAND, cpu=True) * by_step,
        "a step by hand": figures.median(HAND, cpu=True) * by_step,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--worker", help="for this program itself: measure one framework, print JSON")
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(worker(options.worker, options.rounds)))
        return 0
    ours = worker("lit_fast", options.rounds)
    rows = [
        Row(f"validation of {BATCHES} batches / hand loop, {VALIDATED}", ours[VALIDATED], "x", ("<=", 1.2)),
        Row(f"... {HOOKED}", ours[HOOKED], "x"),
        Row("added to a step", ours["added to a step"], "us"),
        Row("a step by hand", ours["a step by hand"], "us"),
    ]
    version = harness.lightning_version(options.lightning_python)
    if version:
        command = [options.lightning_python, "-m", "benchmarks.validation", "--worker", "lightning"]
        command += ["--rounds", str(options.rounds)]
        done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        rows.append(Row(f"Lightning / hand loop, {VALIDATED}", theirs[VALIDATED], "x"))
    return harness.finish("validation", "Validation", rows, options, version)


if __name__ == "__main__":
    sys.exit(main())
