"""ThroughputMonitor: the rows that Lightning 2.6.6 logs in the same run, its training rows one step earlier."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
from heart_models import trainer
from recording_logger import OneLayer, RecordingLogger, loader

from lit_fast.callbacks import ThroughputMonitor
from lit_fast.errors import MisconfigurationException

COUNTS = {"time", "batches", "samples", "lengths"}
RATES = {f"device/{name}_per_sec" for name in ("batches", "samples", "items", "flops")}


class WithFlops(OneLayer):
    flops_per_batch = 10


def monitor(**options: Any) -> ThroughputMonitor:
    return ThroughputMonitor(len, lambda batch: batch.numel(), **{"window_size": 3, **options})


def names(stage: str, *groups: set[str], also: tuple[str, ...] = ()) -> set[str]:
    return {*(f"{stage}/{name}" for group in groups for name in group), *also}


def test_rows_of_a_fit_with_validation() -> None:
    logger = RecordingLogger()
    options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    made = trainer(logger=logger, callbacks=[monitor()], **options)
    made.fit(WithFlops(), loader(7), [loader(3), loader(3)])

    training, full = names("train", COUNTS, RATES, also=("epoch",)), names("validate", COUNTS, RATES)
    validation = [(2, names("validate", COUNTS)), (4, full), (6, full)]
    assert [(step, set(metrics)) for step, metrics in logger.rows] == [
        (2, training), (4, training), *validation, (6, training), (8, training), *validation
    ]  # fmt: skip
    counted = [
        tuple(metrics.get(f"train/{name}") for name in ("batches", "samples", "lengths")) for _, metrics in logger.rows
    ]
    assert [c for c in counted if c[0]] == [(4, 8, 16), (7, 14, 28), (11, 22, 44), (14, 28, 56)]
    newest = logger.rows[-1][1]
    assert newest["validate/device/samples_per_sec"] == pytest.approx(2 * newest["validate/device/batches_per_sec"])
    assert newest["validate/device/flops_per_sec"] == pytest.approx(10 * newest["validate/device/batches_per_sec"])


def test_training_time_leaves_validation_out() -> None:
    class Slow(WithFlops):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            time.sleep(0.3)

    logger = RecordingLogger()
    made = trainer(max_epochs=2, logger=logger, callbacks=[monitor()], log_every_n_steps=1, num_sanity_val_steps=0)
    made.fit(Slow(), loader(2), loader(1))
    times = [metrics["train/time"] for _, metrics in logger.rows if "train/time" in metrics]
    assert len(times) == 4 and times == sorted(times) and times[-1] < 0.3


def test_counts_go_on_from_one_validation_to_the_next() -> None:
    logger = RecordingLogger()
    made = trainer(logger=logger, callbacks=[monitor()], log_every_n_steps=2)
    module = WithFlops()
    for _ in range(2):
        made.validate(module, loader(5), verbose=False)
    short, full = names("validate", COUNTS), names("validate", COUNTS, RATES)
    assert [(step, set(metrics)) for step, metrics in logger.rows] == [(2, short), (4, full), (7, short), (9, full)]


def test_a_module_without_flops_is_warned_of_once() -> None:
    logger = RecordingLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = trainer(max_epochs=1, logger=logger, callbacks=[monitor(window_size=2)], log_every_n_steps=1)
        made.fit(OneLayer(), loader(3))
    assert [str(w.message) for w in caught if "flops_per_batch" in str(w.message)].__len__() == 1
    assert "train/device/batches_per_sec" in logger.rows[-1][1]
    assert "train/device/flops_per_sec" not in logger.rows[-1][1]


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(MisconfigurationException, match="window_size=1"):
        monitor(window_size=1)
    with pytest.raises(TypeError, match="windows"):
        monitor(windows=3)
