"""EarlyStopping: when it stops and why it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_standins import StandInTrainer

from lit_fast.callbacks import EarlyStopping
from lit_fast.callbacks.early_stopping import EarlyStoppingReason
from lit_fast.errors import MisconfigurationException

NAN = float("nan")
Reason = EarlyStoppingReason


@pytest.mark.parametrize(
    ("options", "values", "epochs", "reason"),
    [
        ({}, [5, 4, 3, 2, 1], 5, Reason.NOT_STOPPED),
        ({"patience": 2}, [3, 2, 2, 2, 1], 4, Reason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "mode": "max"}, [1, 2, 2, 2, 3], 4, Reason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.9, 2.8, 1], 3, Reason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "min_delta": 0.5, "mode": "max"}, [3, 3.1, 3.2, 9], 3, Reason.PATIENCE_EXHAUSTED),
        ({}, [3, NAN, 1], 2, Reason.NON_FINITE_METRIC),
        ({"check_finite": False, "patience": 9}, [3, NAN, 1], 3, Reason.NOT_STOPPED),
        ({"stopping_threshold": 2.5}, [3, 2, 1], 2, Reason.STOPPING_THRESHOLD),
        ({"divergence_threshold": 8}, [3, 9, 1], 2, Reason.DIVERGENCE_THRESHOLD),
        ({"divergence_threshold": 2, "mode": "max"}, [3, 1, 9], 2, Reason.DIVERGENCE_THRESHOLD),
    ],
)
def test_stops(tmp_path: Path, options: dict[str, Any], values: list[float], epochs: int, reason: Reason) -> None:
    trainer = StandInTrainer(tmp_path)
    callback = EarlyStopping("val_loss", **options)
    trainer.run(callback, [{"val_loss": torch.tensor(float(value))} for value in values])
    assert trainer.current_epoch == epochs - 1
    assert callback.stopping_reason is reason
    assert trainer.should_stop == (reason is not Reason.NOT_STOPPED)
    assert (callback.stopping_reason_message is not None) == trainer.should_stop
    assert callback.stopped_epoch == (epochs - 1 if trainer.should_stop else 0)


@pytest.mark.parametrize(("interval", "checks"), [(1.0, 1), (0.5, 2)])
def test_checks_once_per_epoch_or_per_validation(tmp_path: Path, interval: float, checks: int) -> None:
    trainer = StandInTrainer(tmp_path, val_check_interval=interval)
    callback = EarlyStopping("val_loss", patience=99)
    trainer.run(callback, [{"val_loss": torch.tensor(1.0)}], val_at=(1, 3))
    assert callback.wait_count == checks - 1


def test_state_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = EarlyStopping("val_loss", patience=3)
    StandInTrainer(tmp_path).run(first, [{"val_loss": torch.tensor(1.0)}] * 3)
    torch.save(first.state_dict(), tmp_path / "state")
    again = EarlyStopping("val_loss", patience=3)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    trainer = StandInTrainer(tmp_path)
    trainer.run(again, [{"val_loss": torch.tensor(1.0)}] * 3)
    assert trainer.current_epoch == 0 and again.stopping_reason is Reason.PATIENCE_EXHAUSTED
    assert again.state_key == "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"


def test_a_missing_metric_is_an_error_that_lists_what_is_logged(tmp_path: Path) -> None:
    scores = [{"val_loss": torch.tensor(1.0)}]
    with pytest.raises(MisconfigurationException, match=r"'acc'.*'val_loss'"):
        StandInTrainer(tmp_path).run(EarlyStopping("acc"), scores)
    trainer = StandInTrainer(tmp_path)
    with pytest.warns(RuntimeWarning, match="'acc'"):
        trainer.run(EarlyStopping("acc", strict=False, verbose=True), scores)
    assert not trainer.should_stop
    with pytest.raises(MisconfigurationException, match="mode='low'"):
        EarlyStopping("acc", mode="low")
