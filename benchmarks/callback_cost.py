"""What a callback adds to a training step: five of them, each overriding one hook with an empty body.

The cost is the difference between a step with five and a step without, divided by five. A microsecond is far
below what a shared machine's clock drifts by from one fit to the next, so all fits run at once, each in a
thread of its own, and their loaders pass a turn round: one trains a few steps, then waits while the others
do. A round's figure is the median of the differences within its turns, in processor time as in log_cost;
where a fit's objects lie in memory moves it by a microsecond, so it is the median of several rounds.
`on_train_batch_end` is handed the loss, which is detached once for all callbacks, so the first one of them
is told apart from each further one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row

QUICK = True
NONE, FIVE, END, ENDS = "no callback", "five hooks of the step", "one on_train_batch_end", "five on_train_batch_end"
CASES: dict[str, Sequence[str]] = {
    NONE: (),
    FIVE: (
        "on_train_batch_start on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step"
    ).split(),
    END: ["on_train_batch_end"],
    ENDS: ["on_train_batch_end"] * 5,
}
# Steps after a change of threads that are not timed: they fetch their memory into the caches again.
WARMUP = 2


def callback_with(hook: str) -> Any:
    """An instance of a class that overrides `hook` and nothing else."""
    import lit_fast

    def body(self: Any, *args: Any) -> None: ...

    return type("OneHook", (lit_fast.Callback,), {hook: body})()


class Batches:
    """Batches for `turns` turns of `steps` timed steps; waits for `mine` before each turn, then says so to `next`."""

    def __init__(self, turns: int, steps: int, mine: threading.Semaphore, following: threading.Semaphore) -> None:
        import torch

        self.turns, self.steps, self.mine, self.following = turns, steps, mine, following
        self.batch = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        self.microseconds: list[float] = []

    def __len__(self) -> int:
        return self.turns * (WARMUP + self.steps) + 1

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.turns):
            self.mine.acquire()
            for _ in range(WARMUP):
                yield self.batch
            start = time.thread_time()
            for _ in range(self.steps):
                yield self.batch
            self.microseconds.append((time.thread_time() - start) / self.steps * 1e6)
            self.following.release()
        # A loop that knows the length asks for no batch after the last: one more, so that the last turn ends, too.
        yield self.batch


def fit(hooks: Sequence[str], batches: Batches, root: Path, profiler: Any = None) -> None:
    """A fit on `batches` with a callback for each of `hooks`."""
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

    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [callback_with(hook) for hook in hooks]
    trainer = lit_fast.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=root, callbacks=callbacks,
        profiler=profiler, **quiet
    )  # fmt: skip
    trainer.fit(Model(), batches)


def measure(cases: Mapping[str, Sequence[str]], turns: int, steps: int, root: Path) -> dict[str, list[float]]:
    """Microseconds of a step in each turn of each case, all of them trained in turns."""
    return in_turns({case: partial(fit, hooks, root=root) for case, hooks in cases.items()}, turns, steps)


def in_turns(cases: Mapping[str, Callable[[Batches], None]], turns: int, steps: int) -> dict[str, list[float]]:
    """Microseconds of a step in each turn of each fit."""
    gates = [threading.Semaphore(0) for _ in cases]
    loaders = [Batches(turns, steps, gate, gates[(index + 1) % len(gates)]) for index, gate in enumerate(gates)]
    threads = [
        threading.Thread(target=run, args=(loader,), daemon=True)
        for run, loader in zip(cases.values(), loaders, strict=True)
    ]
    for thread in threads:
        thread.start()
    gates[0].release()
    for thread in threads:
        thread.join()
    return {case: loader.microseconds for case, loader in zip(cases, loaders, strict=True)}


def difference(figures: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(figure - other for figure, other in zip(figures, base, strict=True))


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark whose fits run in turns."""
    parser = harness.arguments(description)
    parser.set_defaults(rounds=rounds)
    parser.add_argument("--turns", type=int, default=800, help="turns of each round (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each turn (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, rounds=9).parse_args(argv)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        rounds = [measure(CASES, options.turns, options.steps, Path(name)) for _ in range(options.rounds)]

    def added(case: str, base: str) -> float:
        return statistics.median(difference(found[case], found[base]) for found in rounds)

    rows = [
        Row(f"{NONE}: a step", statistics.median(statistics.median(found[NONE]) for found in rounds), "us"),
        Row("five hooks of the step, a callback", added(FIVE, NONE) / 5, "us", ("<=", 1.0)),
        Row("first on_train_batch_end, which detaches the loss", added(END, NONE), "us"),
        Row("each further on_train_batch_end", added(ENDS, END) / 4, "us", ("<=", 1.0)),
    ]
    return harness.finish("callback_cost", "Cost of a callback that overrides one hook", rows, options)


if __name__ == "__main__":
    sys.exit(main())
