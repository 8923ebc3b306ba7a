"""Timer: durations, stopping, and going on after a resume."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from callback_standins import StandInTrainer

from lit_fast.callbacks import Timer
from lit_fast.errors import MisconfigurationException


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000, 9000))
    monkeypatch.setattr("lit_fast.callbacks.timer.time.monotonic", lambda: next(ticks))


@pytest.mark.parametrize(
    "duration", ["01:02:03:04", timedelta(1, 7384), {"days": 1, "hours": 2, "minutes": 3, "seconds": 4}]
)
def test_durations(duration: Any) -> None:
    assert Timer(duration).time_remaining() == 93784


@pytest.mark.parametrize(
    ("options", "message"), [({"duration": "1:2"}, "DD:HH:MM:SS"), ({"interval": "hour"}, "'step'")]
)
def test_what_cannot_be_read_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Timer(**options)
    with pytest.raises(MisconfigurationException, match="no stage 'fly'"):
        Timer().time_elapsed("fly")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("interval", "epoch"), [("step", 0), ("epoch", 0)])
def test_stops_when_the_time_is_up_and_a_resumed_run_has_less(tmp_path: Path, interval: str, epoch: int) -> None:
    trainer = StandInTrainer(tmp_path)
    timer = Timer({"seconds": 1}, interval=interval)
    trainer.run(timer, [{}] * 3)
    assert trainer.should_stop and trainer.current_epoch == epoch
    assert timer.start_time() == 1000 and timer.end_time("train") is not None
    state = timer.state_dict()
    assert state["time_elapsed"]["train"] == timer.time_elapsed() > 0

    again, trainer = Timer({"seconds": 1}), StandInTrainer(tmp_path)
    again.load_state_dict(state)
    again.on_fit_start(trainer, None)
    assert trainer.should_stop


def test_only_hooks_that_the_options_need_are_live() -> None:
    assert "on_train_batch_end" not in Timer().live_hooks()
    assert "on_train_batch_end" in Timer("00:00:00:01").live_hooks()
    epochs = Timer("00:00:00:01", interval="epoch").live_hooks()
    assert "on_train_batch_end" not in epochs and "on_train_epoch_end" in epochs
