"""What one more `self.log` in each training step costs, and that it keeps the value it was given.

The cost is the slope of a step's time over the number of logged values (1 and 41), each time of a step taken
inside a whole `fit` with the CSV logger. It is processor time: nothing
waits here, and a microsecond is too small for the wall clock of a shared machine.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row, Time
from benchmarks.step_overhead import make_loader

QUICK = True
MORE = 40

# What is logged once more, as arguments of self.log; the first one carries the promise.
FORMS: dict[str, dict[str, Any]] = {
    "self.log(name, tensor)": {},
    "self.log(name, tensor, prog_bar=True)": {"prog_bar": True},
    "self.log(name, tensor, on_step=True, on_epoch=True)": {"on_step": True, "on_epoch": True},
    "self.log(name, tensor, on_epoch=True, batch_size=4)": {
        "on_step": False,
        "on_epoch": True,
        "batch_size": 4,
    },
}


def fit(steps: int, logged: int, form: dict[str, Any], root: Path) -> Time:
    """Microseconds of a step that logs `logged` tensors, in a fit of its own."""
    import torch

    import lit_fast
    from lit_fast.loggers import CSVLogger

    names = [f"value_{index}" for index in range(logged)]

    class Model(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            for name in names:
                self.log(name, loss, **form)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    trainer = lit_fast.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(tempfile.mkdtemp(dir=root)),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    loader = make_loader(steps)
    trainer.fit(Model(), loader)
    began, ended = loader.dataset.stamps
    return began.slope(ended, steps, 1e6)


def one_more(steps: int, form: dict[str, Any], root: Path) -> Callable[[], Time]:
    """Microseconds that one more logged value adds to a step."""

    return lambda: fit(steps, 1, form, root).slope(fit(steps, 1 + MORE, form, root), MORE, 1.0)


def kept_values(root: Path) -> tuple[list[float], list[float]]:
    """What was seen of values that were changed in place after `log`, and what they were when logged."""
    import torch

    import lit_fast

    seen: list[float] = []
    given: list[float] = []

    class Model(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            value = loss.detach().clone()
            given.append(value.item())
            self.log("value", value)
            value.fill_(-1.0)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, batch_idx: int) -> None:
            seen.append(float(self.trainer.callback_metrics["value"]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lit_fast.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=root, **quiet)
    trainer.fit(Model(), make_loader(20))
    return seen, given


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.set_defaults(rounds=21)
    parser.add_argument("--steps", type=int, default=1000, help="timed steps of a fit (default %(default)s)")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        measured = harness.Rounds(
            {case: one_more(options.steps, form, root) for case, form in FORMS.items()}, options.rounds
        )
        seen, given = kept_values(root)
    promise = next(iter(FORMS))
    rows = [
        Row(
            f"one more {case}",
            measured.median(case, cpu=True),
            "us",
            ("<=", 1.5) if case == promise else None,
        )
        for case in FORMS
    ]
    wrong = sum(a != b for a, b in zip(seen, given, strict=True))
    rows.append(Row("logged values that an in-place change reached", wrong, "values", ("<=", 0)))
    return harness.finish("log_cost", "Cost of self.log", rows, options)


if __name__ == "__main__":
    sys.exit(main())
