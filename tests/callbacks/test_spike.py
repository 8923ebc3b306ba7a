"""SpikeDetection against what Lightning 2.6.6 does with the same losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heart_models import trainer
from recording_logger import OneLayer, loader

from lit_fast.callbacks import ModelCheckpoint, SpikeDetection
from lit_fast.callbacks.spike import LossSpikes
from lit_fast.errors import MisconfigurationException, TrainingSpikeException
from lit_fast.strategies.single_device import SingleDeviceStrategy

FABRIC = SimpleNamespace(strategy=SingleDeviceStrategy(), global_rank=0)


def feed(watch: LossSpikes, losses: list[float]) -> list[float]:
    """Means after each loss; ends with the spike's batch where there was one."""
    means: list[float] = []
    for batch_idx, loss in enumerate(losses):
        try:
            watch.on_train_batch_end(FABRIC, torch.tensor(loss), None, batch_idx)
        except TrainingSpikeException as spike:
            assert f"batch {batch_idx}" in str(spike)
            return [*means, spike.batch_idx]
        means.append(watch.running_mean)
    return means


def test_the_mean_is_of_the_window_and_passes_over_nan() -> None:
    losses = [1.0, 2.0, math.nan, 4.0, 5.0, 6.0]
    assert feed(LossSpikes(window=3, warmup=9), losses) == [1.0, 1.5, 1.5, 3.0, 4.5, 5.0]


@pytest.mark.parametrize(
    ("options", "losses", "result"),
    [
        ({}, [1.0, 2.875], [1.0, 1.9375]),
        ({}, [1.0, 3.0], [1.0, 1]),  # exactly twice the mean away
        ({}, [1.0, 0.0, -9.0], [1.0, 0.5, -8 / 3]),  # better is no spike, however far
        ({"mode": "max"}, [1.0, -1.0], [1.0, 1]),
        ({"atol": 5.0}, [1.0, 5.75], [1.0, 3.375]),
        ({"atol": 5.0}, [1.0, 6.0], [1.0, 1]),
        ({"rtol": None, "atol": 0.5}, [10.0, 10.5], [10.0, 1]),
        ({"warmup": 2}, [1.0, 9.0, 2.0], [1.0, 5.0, 4.0]),
        ({}, [1.0, math.inf], [1.0, 1]),
        ({}, [1.0, math.nan], [1.0, 1]),
        ({"finite_only": False}, [1.0, math.nan, 2.0], [1.0, 1.0, 1.5]),
        ({"finite_only": False}, [1.0, math.inf], [1.0, 1]),
    ],
)
def test_which_losses_are_spikes(
    tmp_path: Path, options: dict[str, Any], losses: list[float], result: list[float]
) -> None:
    assert feed(LossSpikes(exclude_batches_path=tmp_path, **options), losses) == result


def test_the_bad_batches_are_written(tmp_path: Path) -> None:
    feed(LossSpikes(exclude_batches_path=tmp_path / "new"), [1.0, 1.0, 9.0])
    assert json.loads((tmp_path / "new" / "skip_batches.json").read_text()) == [1, 2]
    feed(LossSpikes(exclude_batches_path=tmp_path / "named.json"), [1.0, 9.0])
    assert json.loads((tmp_path / "named.json").read_text()) == [0, 1]


class Leaps(OneLayer):
    """Its loss is 1 up to batch `at` of the third epoch, and 100 there."""

    def __init__(self, at: int, as_dict: bool = False) -> None:
        super().__init__()
        self.at, self.as_dict = at, as_dict

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum() * 0 + (100.0 if (self.current_epoch, batch_idx) == (2, self.at) else 1.0)
        return {"loss": loss} if self.as_dict else loss


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_fit_ends_at_the_spike(tmp_path: Path, as_dict: bool) -> None:
    made = trainer(max_epochs=5, callbacks=[SpikeDetection()], default_root_dir=tmp_path)
    with pytest.raises(TrainingSpikeException, match="batch 1"):
        made.fit(Leaps(1, as_dict), loader(3))
    assert made.current_epoch == 2 and made.interrupted
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [0, 1]


def test_a_resumed_fit_knows_the_mean(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path)
    options = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer(max_epochs=2, callbacks=[SpikeDetection(window=4), saver], **options).fit(Leaps(0), loader(3))
    watch = SpikeDetection(window=4, warmup=0)
    made = trainer(max_epochs=5, callbacks=[watch], **options)
    with pytest.raises(TrainingSpikeException, match="batch 1"):
        made.fit(Leaps(1), loader(3), ckpt_path=saver.best_model_path)
    assert watch.warmup == 1  # restored, as all its options
    assert list(watch.running) == [1.0] * 4 and watch.bad_batches == [0, 1]


def test_a_state_of_lightnings_is_taken() -> None:
    state = {
        "last_val": 6, "mode": "max", "warmup": 9, "atol": None, "rtol": 1.0, "bad_batches": [3, 4],
        "bad_batches_path": "skip_batches.json", "running": {}, "mean": {},
    }  # fmt: skip
    watch = SpikeDetection()
    watch.load_state_dict(state)
    assert watch.state_dict() == {**state, "running": {"values": []}}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'maximum'"):
        SpikeDetection(mode="maximum")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="window=0"):
        SpikeDetection(window=0)

    class Silent(OneLayer):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(TypeError, match="batch 0 it gave NoneType"):
        trainer(max_epochs=1, callbacks=[SpikeDetection()]).fit(Silent(), loader(1))
