"""What importing lit_fast costs beyond torch, and how soon the first training step runs.

Each figure is a difference between two kinds of new processes, started in turn; files are in the page cache
and compiled to bytecode, as they are from the second start on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Row, Time

QUICK = True

IMPORT = """
import time, torch
start = time.perf_counter(), time.process_time()
import {package}; {package}.Trainer
print("@@%.6f %.6f@@" % (time.perf_counter() - start[0], time.process_time() - start[1]))
"""

DATA = """
import time, torch
from torch.utils.data import DataLoader
loader = DataLoader(torch.randn(64, 32), batch_size=4)
"""

HAND_LOOP = (
    DATA
    + """
layer = torch.nn.Linear(32, 2)
optimizer = torch.optim.AdamW(layer.parameters())
for batch in loader:
    print("@@%.6f %.6f@@" % (time.time(), time.process_time()))
    optimizer.zero_grad()
    layer(batch).sum().backward()
    optimizer.step()
    break
"""
)

TRAINER = (
    DATA
    + """
import {package} as L

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            print("@@%.6f %.6f@@" % (time.time(), time.process_time()))
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

L.Trainer(max_epochs=1).fit(Model(), loader)
"""
)


def told(python: str, program: str, folder: Path) -> Time:
    """The two numbers that a program prints between @@ and @@, run under a pseudo-terminal."""
    code, screen = harness.in_terminal([python, "-W", "ignore", "-c", program], cwd=folder)
    if code:
        raise SystemExit(f"a process failed:\n{screen.decode(errors='replace')[-3000:]}")
    return Time(*map(float, screen.split(b"@@")[1].split()))


def import_seconds(python: str, package: str, folder: Path) -> Callable[[], Time]:
    return lambda: told(python, IMPORT.format(package=package), folder)


def first_step_seconds(python: str, program: str, folder: Path) -> Callable[[], Time]:
    """From the start of the process to the first step; both clocks are the machine's."""

    def measure() -> Time:
        start = time.time()
        first = told(python, program, folder)
        return Time(first.wall - start, first.cpu)

    return measure


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.arguments(__doc__).parse_args(argv)
    pythons = {"lit_fast": sys.executable}
    if options.lightning_python:
        pythons["lightning"] = options.lightning_python
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package, python in pythons.items():
            start = {
                "import": import_seconds(python, package, folder),
                "hand loop": first_step_seconds(python, HAND_LOOP, folder),
                "trainer": first_step_seconds(python, TRAINER.format(package=package), folder),
            }
            measured = harness.Rounds(start, options.rounds)
            ours = package == "lit_fast"
            label = "" if ours else "Lightning, "
            importing = f"{label}import {package}; {package}.Trainer, beyond import torch"
            first_step = f"{label}process start to first training step, beyond the hand loop"
            for note, cpu in (("", False), (", processor time", True)):
                promised = ours and not cpu
                milliseconds = measured.median("import", cpu) * 1e3
                seconds = measured.difference("trainer", "hand loop", cpu)
                rows += [
                    Row(importing + note, milliseconds, "ms", ("<=", 150) if promised else None),
                    Row(first_step + note, seconds, "s", ("<=", 0.4) if promised else None),
                ]
    return harness.finish("import_time", "Start", rows, options, harness.lightning_version(options.lightning_python))


if __name__ == "__main__":
    sys.exit(main())
