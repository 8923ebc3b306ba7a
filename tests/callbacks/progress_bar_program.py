"""Two short epochs with a progress bar and prints in between; test_rich_progress.py forks to run it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from callback_standins import StandInTrainer

from lit_fast.callbacks import RichProgressBar


def main(ending: str) -> None:
    """End by "end", "exception" or "interrupt", then print the redraws and the seconds."""
    trainer = StandInTrainer(Path(), num_training_batches=40, num_val_batches=[5], max_epochs=2)
    trainer._evaluation = SimpleNamespace(batch_idx=-1, dataloader_idx=0)
    loop = trainer.fit_loop.epoch_loop
    bar = RichProgressBar()
    stdout, stderr = sys.stdout, sys.stderr
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    begun = time.monotonic()
    for epoch in range(2):
        trainer.current_epoch, loop.batch_idx = epoch, -1
        bar.on_train_epoch_start(trainer, None)
        for batch_idx in range(40):
            loop.batch_idx = batch_idx
            trainer.progress_bar_metrics = {"loss": torch.tensor(0.125), "lr": 1e-5}
            time.sleep(0.01)
            if batch_idx == 15:
                print(f"printed in epoch {epoch}")
                print("to the other stream", file=sys.stderr)
            if batch_idx == 25:
                print("unfinished ... ", end="", flush=True)
                time.sleep(0.2)
                print("finished")
        bar.on_validation_start(trainer, None)
        for batch_idx in range(5):
            trainer._evaluation.batch_idx = batch_idx
            time.sleep(0.05)
        bar.on_validation_end(trainer, None)
        bar.on_train_epoch_end(trainer, None)
    seconds = time.monotonic() - begun
    if ending == "end":
        bar.on_train_end(trainer, None)
        redraws = bar.redraws
        bar.teardown(trainer, None, "fit")
    else:
        redraws = bar.redraws
        bar.on_exception(trainer, None, {"exception": ValueError(), "interrupt": KeyboardInterrupt()}[ending])
        bar.teardown(trainer, None, "fit")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    print(f"RESULT {redraws} {seconds:.3f}")
