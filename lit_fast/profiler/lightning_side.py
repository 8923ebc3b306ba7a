"""A program's fit under Lightning's own Trainer, timed window by window through Lightning's interface for profilers.

It is run by its path, in an interpreter that has Lightning and need not have lit_fast:

    python lightning_side.py OUT.json SIZE WINDOWS (script.py | -m module) [arguments ...]

`import lit_fast` in the program gives Lightning here. The program ends when its fit has taken the steps.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from contextlib import suppress
from time import perf_counter
from typing import Any

# Lightning's actions by phase: the first row of which a part is in the action's name. Others belong to whatever is
# around them.
PHASES = (
    ("train_dataloader_next", "data"),
    (".batch_to_device", "transfer"),
    ("batch_transfer", "transfer"),
    ("transfer_batch_to_device", "transfer"),
    (".training_step", "forward"),
    (".backward", "backward"),
    ("optimizer_step", "optimizer"),
    ("optimizer_zero_grad", "optimizer"),
    ("configure_gradient_clipping", "optimizer"),
    ("lr_scheduler_step", "schedulers"),
    ("save_checkpoint", "checkpoint"),
    ("validation", "validation"),
    (".val_", "validation"),
    ("[Callback]", "hooks"),
    ("[LightningModule]", "hooks"),
)
DATA = "train_dataloader_next"
HOOKS_IN_OPTIMIZER = ".on_"  # on_before_optimizer_step is a hook, though its name holds the optimizer's


class EnoughSteps(BaseException):
    """The windows are complete: the program need not go on."""


class Windows:
    """A clock of phases, told of actions: each moment belongs to the innermost one."""

    def __init__(self, size: int, windows: int) -> None:
        self.size, self.wanted = size, windows
        self.seconds: dict[str, float] = {}
        self.stack = ["unexplained"]
        self.since = perf_counter()
        self.left = 0
        self.last: dict[str, float] | None = None
        self.windows: list[dict[str, float]] = []
        self.synchronize: Any = None

    def switch(self) -> None:
        now = perf_counter()
        phase = self.stack[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now

    def start(self, action: str) -> None:
        if DATA in action:
            self.border()
        self.switch()
        self.stack.append(phase_of(action) or self.stack[-1])

    def stop(self, action: str) -> None:
        self.switch()
        self.stack.pop()

    def border(self) -> None:
        """Before each batch is fetched."""
        if not self.left:
            if self.synchronize is not None:
                self.synchronize()
            self.switch()
            if self.last is not None:
                self.windows.append(
                    {name: (value - self.last.get(name, 0.0)) / self.size for name, value in self.seconds.items()}
                )
            self.last = dict(self.seconds)
            if len(self.windows) == self.wanted:
                raise EnoughSteps
            self.left = self.size
        self.left -= 1


def phase_of(action: str) -> str | None:
    if HOOKS_IN_OPTIMIZER in action and "validation" not in action and "batch_transfer" not in action:
        return "hooks"
    return next((phase for part, phase in PHASES if part in action), None)


def time_fits(package: str, clock: Windows) -> bool:
    """Let the first fit of that package's Trainer be timed; False where it is not installed."""
    try:
        pl = importlib.import_module(package)
        profilers = importlib.import_module(f"{package}.profilers")
    except ModuleNotFoundError:
        return False

    class Told(profilers.Profiler):  # type: ignore[misc, name-defined]
        def start(self, action_name: str) -> None:
            clock.start(action_name)

        def stop(self, action_name: str) -> None:
            clock.stop(action_name)

    original = pl.Trainer.fit

    def fit(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        if trainer.strategy.root_device.type == "cuda":
            clock.synchronize = torch.cuda.synchronize
        trainer.profiler = Told()
        return original(trainer, *args, **kwargs)

    pl.Trainer.fit = fit
    return True


def run(arguments: list[str]) -> None:
    """The program, as `python` would run it."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def main(out: str, size: str, windows: str, *arguments: str) -> int:
    # This file's own folder, which Python has put first, holds modules whose names are other packages' too.
    sys.path.pop(0)
    clock = Windows(int(size), int(windows))
    packages = [name for name in ("lightning.pytorch", "pytorch_lightning") if time_fits(name, clock)]
    if not packages:
        print(f"{sys.executable} has neither lightning nor pytorch_lightning installed.", file=sys.stderr)
        return 3
    root = packages[0].partition(".")[0]
    sys.modules["lit_fast"] = importlib.import_module(root)
    for name in ("callbacks", "loggers", "strategies", "utilities"):
        sys.modules[f"lit_fast.{name}"] = importlib.import_module(f"{packages[0]}.{name}")
    sys.modules["lit_fast.pytorch"] = importlib.import_module(packages[0])
    with suppress(EnoughSteps):
        run(list(arguments))
    versions = {"lightning": sys.modules[root].__version__, "torch": sys.modules["torch"].__version__}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"windows": clock.windows, "versions": versions}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
