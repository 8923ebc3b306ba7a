"""Small stand-ins for the Trainer: just the attributes that callbacks read."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class StandInTrainer(SimpleNamespace):
    """Walks through epochs and calls one callback's hooks in Lightning's order; saves empty files."""

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(
            **{
                "default_root_dir": str(root),
                "loggers": [],
                "is_global_zero": True,
                "ckpt_path": None,
                "fast_dev_run": False,
                "sanity_checking": False,
                "should_stop": False,
                "state": SimpleNamespace(fn="fit", stage="train"),
                "callback_metrics": {},
                "progress_bar_metrics": {},
                "global_step": 0,
                "current_epoch": 0,
                "max_epochs": 10,
                "max_steps": -1,
                "num_training_batches": 4,
                "num_val_batches": [2],
                "num_sanity_val_batches": [2],
                "num_test_batches": [2],
                "num_predict_batches": [2],
                "enable_validation": True,
                "val_check_interval": 1.0,
                "check_val_every_n_epoch": 1,
                "log_every_n_steps": 50,
                "accumulate_grad_batches": 1,
                "_progress": SimpleNamespace(boundary=-1),
                "is_last_batch": False,
                "lr_scheduler_configs": [],
                "optimizers": [],
                "training": True,
                **options,
            }
        )
        loop = SimpleNamespace(batch_idx=-1, _batches_that_stepped=0, val_loop=SimpleNamespace(_has_run=False))
        loop.batch_progress = self
        self.fit_loop = SimpleNamespace(epoch_loop=loop)
        self.strategy = SimpleNamespace(
            world_size=1,
            control=None,
            broadcast=lambda value: value,
            of_first=lambda function: function(),
            reduce_boolean_decision=lambda decision, all=True: decision,
            remove_checkpoint=lambda path: os.path.lexists(path) and os.remove(path),
            barrier=lambda: None,
        )
        self.saved: list[str] = []
        self.module = SimpleNamespace(automatic_optimization=True)

    def save_checkpoint(self, path: str, weights_only: bool | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(str(self.global_step))
        self.saved.append(os.path.basename(path))

    def run(self, callback: Any, scores: list[dict[str, Any]], val_at: tuple[int, ...] | None = None) -> None:
        """One epoch per entry of `scores`, which are the metrics that its validation (or epoch end) logs."""
        hooks = self.module
        callback.setup(self, hooks, "fit")
        callback.on_train_start(self, hooks)
        for epoch, metrics in enumerate(scores):
            self.current_epoch = epoch
            callback.on_train_epoch_start(self, hooks)
            for batch_idx in range(self.num_training_batches):
                self.fit_loop.epoch_loop.batch_idx = batch_idx
                self.global_step += 1
                self.is_last_batch = batch_idx == self.num_training_batches - 1
                callback.on_train_batch_end(self, hooks, None, None, batch_idx)
                if self.validates(batch_idx, val_at):
                    callback.on_validation_start(self, hooks)
                    self.callback_metrics.update(metrics)
                    self.fit_loop.epoch_loop.val_loop._has_run = True
                    callback.on_validation_end(self, hooks)
            if sum(self.num_val_batches) == 0:
                self.callback_metrics.update(metrics)
            callback.on_train_epoch_end(self, hooks)
            if self.should_stop:
                break
        callback.on_train_end(self, hooks)
        callback.teardown(self, hooks, "fit")

    def validates(self, batch_idx: int, val_at: tuple[int, ...] | None) -> bool:
        every = self.check_val_every_n_epoch
        if sum(self.num_val_batches) == 0 or (self.current_epoch + 1) % every:
            return False
        return batch_idx in (val_at or (self.num_training_batches - 1,))
