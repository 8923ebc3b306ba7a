"""A long fit with everything on, which prints what it left behind: python endurance_program.py STEPS FOLDER.

Memory is the process's resident set, read after a collection of cycles at every tenth of the run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from heart_models import Plain, rows
from torch.utils.data import DataLoader

import lit_fast
from lit_fast.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lit_fast.loggers import CSVLogger


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> list[str]:
    """What each file descriptor is open on."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return sorted(found)


class Watched(Plain):
    """Logs, validates, and keeps weak references to batches."""

    def __init__(self, readings: list[int], every: int) -> None:
        super().__init__()
        self.readings, self.every = readings, every
        self.batches: list[Any] = []
        self.end: Any = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.end is not None:
            self.end(self, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train", loss, prog_bar=True, on_step=True, on_epoch=True)
        if self.global_step % self.every == 0:
            gc.collect()
            self.readings.append(resident())
            self.batches.append(weakref.ref(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), prog_bar=True)


def fit(steps: int, folder: Path, end: Any = None) -> dict[str, Any]:
    """One fit; `end(module, batch_idx)` may break it off."""
    readings: list[int] = []
    module = Watched(readings, steps // 10)
    module.end = end
    trainer = lit_fast.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=CSVLogger(folder),
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", monitor="val", save_last=True, save_top_k=2),
            LearningRateMonitor(),
            RichProgressBar(refresh_rate=50),
        ],
        enable_model_summary=False,
        default_root_dir=folder,
    )
    train = DataLoader(rows(400), batch_size=2, shuffle=True)
    with contextlib.suppress(RuntimeError, SystemExit):
        trainer.fit(module, train, DataLoader(rows(8, seed=2), batch_size=4))
    alive = {"trainer": weakref.ref(trainer), "module": weakref.ref(module)}
    batches = module.batches
    held = sum(batch() is not None for batch in batches)
    del trainer, module, train
    gc.collect()
    return {
        "readings": readings,
        "batches_held_by_the_trainer": held,
        "gone": {name: reference() is None for name, reference in alive.items()},
        "batches_gone": all(batch() is None for batch in batches),
    }


def main(steps: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fit(20, folder / "warm")  # loads what is loaded once in a process
    before = open_files(), threading.active_count()
    result = fit(steps, folder / "long")

    def fail(module: Any, batch_idx: int) -> None:
        if module.global_step == 7:
            raise RuntimeError("on purpose")

    def interrupt(module: Any, batch_idx: int) -> None:
        if module.global_step == 7:
            os.kill(os.getpid(), 2)

    for name, end in (("exception", fail), ("interrupt", interrupt)):
        result[name] = fit(20, folder / name, end)
    result["open_files"] = [before[0], open_files()]
    result["threads"] = [before[1], threading.active_count()]
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
