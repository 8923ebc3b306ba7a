"""What a callback adds to a training step: five of them, each overriding one hook with an empty body.

The cost is the difference between a step with five and a step without, divided by five; a step's time is the
slope between N and 2N steps of a whole `fit`. Processor time, as in log_cost: a microsecond is too small for
the wall clock of a shared machine. Two sets of five: each another hook of the step, and all five
`on_train_batch_end`, which is handed the loss and so needs it detached, once for all of them.
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
NONE = "no callback"
SETS = {
    "five hooks of the step": (
        "on_train_batch_start on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step"
    ).split(),
    "five times on_train_batch_end": ["on_train_batch_end"] * 5,
}


def callback_with(hook: str) -> Any:
    """An instance of a class that overrides `hook` and nothing else."""
    import lit_fast

    def body(self: Any, *args: Any) -> None: ...

    return type("OneHook", (lit_fast.Callback,), {hook: body})()


def step(steps: int, hooks: Sequence[str], root: Path) -> Callable[[], Time]:
    """Microseconds of one training step with a callback for each of `hooks`."""
    import torch

    import lit_fast

    class Model(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    def fit(count: int) -> Time:
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [callback_with(hook) for hook in hooks]
        trainer = lit_fast.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, default_root_dir=root, callbacks=callbacks, **quiet
        )
        return harness.elapsed(lambda: trainer.fit(Model(), make_loader(count)))

    return lambda: fit(steps).slope(fit(2 * steps), steps, 1e6)


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="N of the slope (default %(default)s)")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cases = {NONE: step(options.steps, (), root)}
        cases.update({case: step(options.steps, hooks, root) for case, hooks in SETS.items()})
        measured = harness.Rounds(cases, options.rounds)
    rows = [
        Row(f"{case}, a callback", measured.difference(case, NONE, cpu=True) / 5, "us", ("<=", 1.0)) for case in SETS
    ]
    return harness.finish("callback_cost", "Cost of a callback that overrides one hook", rows, options)


if __name__ == "__main__":
    sys.exit(main())
