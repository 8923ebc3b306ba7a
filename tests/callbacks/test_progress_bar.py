"""What every progress bar knows: labels, totals, metrics."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from callback_standins import StandInTrainer

from lit_fast.callbacks import ProgressBar
from lit_fast.errors import MisconfigurationException


def test_totals(tmp_path: Path) -> None:
    bar = ProgressBar()
    with pytest.raises(MisconfigurationException, match="trainer"):
        _ = bar.trainer
    trainer = StandInTrainer(tmp_path, num_val_batches=[3, math.inf], num_sanity_val_batches=[1, 2])
    bar.setup(trainer, None, "fit")
    assert bar.total_train_batches == 4
    assert bar.has_dataloader_changed(0) and not bar.has_dataloader_changed(0) and bar.has_dataloader_changed(1)
    assert bar.total_val_batches_current_dataloader == math.inf
    trainer.sanity_checking = True
    assert bar.total_val_batches_current_dataloader == 2
    bar.reset_dataloader_idx_tracker()
    assert bar.total_val_batches_current_dataloader == 1
    assert bar.total_val_batches == math.inf
    trainer.check_val_every_n_epoch = 2
    assert bar.total_val_batches == 0
    trainer.max_epochs, trainer.max_steps, trainer.global_step = -1, 10, 8
    assert bar.total_train_batches == 2


def test_metrics_are_the_version_and_what_was_logged(tmp_path: Path) -> None:
    trainer = StandInTrainer(tmp_path, progress_bar_metrics={"loss": 0.5})
    bar = ProgressBar()
    assert bar.get_metrics(trainer, None) == {"loss": 0.5}
    for version, shown in ((3, 3), (0, 0), ("2026-01-31", "1-31")):
        trainer.loggers = [SimpleNamespace(version=version)]
        assert bar.get_metrics(trainer, None) == {"v_num": shown, "loss": 0.5}
    trainer.loggers = [SimpleNamespace(version="")]
    assert bar.get_metrics(trainer, None) == {"loss": 0.5}


def test_other_processes_show_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="disable"):
        ProgressBar().setup(StandInTrainer(tmp_path, is_global_zero=False), None, "fit")
