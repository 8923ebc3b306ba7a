"""What a trainer's step costs, against the hand-written eager loop that has none of its features.

Linear(32, 2), batch 4, AdamW as torch gives it, one thread, data in memory. The data itself looks at the
clock, in its first and its last batch of the timed steps: start, end and checkpoint stay outside, alike for a
hand-written loop and for a whole `fit`. Many short rounds, since clocks drift within seconds. Everything runs
under a pseudo-terminal, where the progress bar draws. Lightning runs in a process of its own, beside its own
hand-written loop, and only ratios are compared.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import harness
from benchmarks.harness import Row, Time

QUICK = True
HAND, ADOPTED, FULL_CSV, FULL_TB, BARE = (
    "hand loop",
    "hand loop + adopt",
    "full, CSV",
    "full, TensorBoard",
    "bare",
)
MARK = "@@ {} @@"
LOG_EVERY = 50
UNTIMED = 2 * LOG_EVERY  # the first steps of a run


# ---- the worker: one framework, all of its cases interleaved ----


def make_loader(steps: int) -> Any:
    """Batches for UNTIMED and then `steps` timed steps; its dataset's `stamps` are when these began and ended."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class InMemory(Dataset[torch.Tensor]):
        batches = torch.randn(64, 4, 32, generator=torch.Generator().manual_seed(0)).unbind()
        stamps: ClassVar[list[Time]] = []

        def __len__(self) -> int:
            return UNTIMED + steps + 1

        def __getitem__(self, index: int) -> torch.Tensor:
            if index == UNTIMED or index == UNTIMED + steps:
                self.stamps.append(Time.now())
            return self.batches[index % 64]

    return DataLoader(InMemory(), batch_size=None)


def hand_loop(loader: Any, adopted: bool) -> None:
    import torch

    layer = torch.nn.Linear(32, 2)
    optimizer: Any = torch.optim.AdamW(layer.parameters())
    if adopted:
        from lit_fast.optim import adopt

        optimizer = adopt(optimizer)
        assert optimizer.compiled, optimizer.reason
    for batch in loader:
        optimizer.zero_grad()
        loss = layer(batch).sum()
        loss.backward()
        optimizer.step()


def trained(framework: str, loader: Any, root: Path, features: str | None) -> Path:
    """A whole fit; returns its folder; `features` is a full one's logger, None is everything off."""
    import torch

    package = importlib.import_module("lightning.pytorch" if framework == "lightning" else "lit_fast.pytorch")
    loggers = importlib.import_module(f"{package.__name__}.loggers")

    class Model(package.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            if features:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    folder = Path(tempfile.mkdtemp(dir=root))
    on = features is not None
    logger: Any = {None: None, FULL_CSV: loggers.CSVLogger, FULL_TB: loggers.TensorBoardLogger}[features]
    trainer = package.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=logger(folder) if on else False,
        enable_checkpointing=on,
        enable_progress_bar=on,
        enable_model_summary=on,
        default_root_dir=folder,
    )
    trainer.fit(Model(), loader)
    assert trainer.global_step == len(loader)
    return folder


def logged_steps(folder: Path) -> list[int]:
    """The step numbers at which "loss" was written, from the event file or from metrics.csv."""
    events = sorted(folder.rglob("events.out.tfevents.*"))
    if events:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(events[0].parent), size_guidance={"scalars": 0})
        reader.Reload()
        return [event.step for event in reader.Scalars("loss")]
    with next(folder.rglob("metrics.csv")).open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("loss")]


def worker(framework: str, steps: int, rounds: int, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        runs: dict[str, Callable[[Any], Any]] = {HAND: lambda loader: hand_loop(loader, adopted=False)}
        if framework == "lit_fast":
            runs[ADOPTED] = lambda loader: hand_loop(loader, adopted=True)
        for case, features in ((FULL_CSV, FULL_CSV), (FULL_TB, FULL_TB), (BARE, None)):
            runs[case] = lambda loader, features=features: trained(framework, loader, root, features)
        folders: dict[str, Path] = {}
        seconds: dict[str, float] = dict.fromkeys(runs, 0.0)

        def step(case: str) -> Callable[[], Time]:
            def measure() -> Time:
                loader = make_loader(steps)
                print(MARK.format(case), flush=True)
                seconds[case] += harness.elapsed(lambda: folders.update({case: runs[case](loader)})).wall
                print(MARK.format("end"), flush=True)
                began, ended = loader.dataset.stamps
                return began.slope(ended, steps, 1e6)

            return measure

        measured = harness.Rounds({case: step(case) for case in runs}, rounds)
        found: dict[str, Any] = {
            "us": {case: measured.median(case) for case in runs},
            "logged steps": {case: logged_steps(folders[case]) for case in (FULL_CSV, FULL_TB)},
            "seconds": seconds,
        }
        for base in (HAND, ADOPTED):
            if base in runs:
                found[f"over {base}"] = {case: measured.ratio(case, base) for case in runs}
                found[f"over {base}, CPU"] = {case: measured.ratio(case, base, cpu=True) for case in runs}
        out.write_text(json.dumps(found))


# ---- the parent: terminal, reading of the screen, verdict ----


def redraws(screen: bytes) -> dict[str, int]:
    """How often each case went back to the start of a line; a newline's own carriage return not counted."""
    counts: dict[str, int] = {}
    for case, text in re.findall(rb"@@ ([^@]+) @@(.*?)@@ end @@", screen, re.DOTALL):
        again = len(re.findall(rb"\r(?!\n)", text))
        counts[case.decode()] = counts.get(case.decode(), 0) + again
    return counts


def run_worker(python: str, framework: str, steps: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "found.json"
        program = [python, "-m", "benchmarks.step_overhead", "--worker", framework, "--out", str(out)]
        code, screen = harness.in_terminal([*program, "--steps", str(steps), "--rounds", str(rounds)])
        if code:
            raise SystemExit(f"{' '.join(program)} failed:\n{screen.decode(errors='replace')[-4000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
    drawn = redraws(screen)
    found["redraws per second"] = {case: drawn.get(case, 0) / seconds for case, seconds in found["seconds"].items()}
    return found


def rows_of(ours: dict[str, Any], steps: int) -> list[Row]:
    rows = [Row(f"{case}: time of a step", us, "us") for case, us in ours["us"].items()]
    promised = {
        HAND: {FULL_CSV: 0.5, FULL_TB: 0.5, BARE: 0.42},
        ADOPTED: {FULL_CSV: 1.15, FULL_TB: 1.15, BARE: 1.0},
    }
    for base, limits in promised.items():
        for case, limit in limits.items():
            rows.append(Row(f"{case} / {base}", ours[f"over {base}"][case], "x", ("<=", limit)))
            rows.append(Row(f"{case} / {base}, processor time", ours[f"over {base}, CPU"][case], "x"))
    expected = list(range(LOG_EVERY, UNTIMED + steps + 2, LOG_EVERY))
    for case in (FULL_CSV, FULL_TB):
        wrong = len(set(expected) ^ set(ours["logged steps"][case]))
        rows.append(Row(f"{case}: rows not at steps 50, 100, ...", wrong, "rows", ("<=", 0)))
        rows.append(Row(f"{case}: redraws", ours["redraws per second"][case], "per s", (">=", 1)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.set_defaults(rounds=41)
    parser.add_argument("--steps", type=int, default=1000, help="timed steps of a run (default %(default)s)")
    parser.add_argument("--worker", choices=("lit_fast", "lightning"), help="used by this program itself")
    parser.add_argument("--out", type=Path, help="used by this program itself")
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.worker, options.steps, options.rounds, options.out)
        return 0
    rows = rows_of(run_worker(sys.executable, "lit_fast", options.steps, options.rounds), options.steps)
    version = harness.lightning_version(options.lightning_python)
    if options.lightning_python:
        theirs = run_worker(options.lightning_python, "lightning", options.steps // 3, max(3, options.rounds // 4))
        for case in (FULL_CSV, FULL_TB, BARE):
            rows.append(Row(f"Lightning, {case}: time of a step", theirs["us"][case], "us"))
            rows.append(Row(f"Lightning, {case} / {HAND}", theirs[f"over {HAND}"][case], "x"))
    return harness.finish("step_overhead", "Step overhead, Linear(32, 2), batch 4, AdamW", rows, options, version)


if __name__ == "__main__":
    raise SystemExit(main())
