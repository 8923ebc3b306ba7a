"""DeviceStatsMonitor: names, steps and choice of figures. Lightning 2.6.6 logs the same rows, its training rows one
step earlier, as all of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from heart_models import trainer
from recording_logger import OneLayer, RecordingLogger, loader

from lit_fast.callbacks import DeviceStatsMonitor
from lit_fast.errors import MisconfigurationException

FIGURES = {"cpu_percent", "cpu_swap_percent", "cpu_vm_percent"}


def rows_of(monitor: DeviceStatsMonitor, **options: Any) -> list[tuple[int | None, dict[str, Any]]]:
    logger = RecordingLogger()
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": 2, **options}
    made = trainer(max_epochs=1, logger=logger, callbacks=[monitor], **options)
    made.fit(OneLayer(), loader(7), [loader(3), loader(3)])
    return logger.rows


def test_rows_stand_at_the_steps_that_are_logged() -> None:
    rows = rows_of(DeviceStatsMonitor())
    hooks = [(step, {name.partition("/")[0] for name in metrics}) for step, metrics in rows]
    val = [{"DeviceStatsMonitor.on_validation_batch_start"}, {"DeviceStatsMonitor.on_validation_batch_end"}]
    train = [{"DeviceStatsMonitor.on_train_batch_start"}, {"DeviceStatsMonitor.on_train_batch_end"}]
    sanity, window = [(0, hook) for hook in val] * 2, [(2, hook) for hook in train] * 2
    last, validated = [(4, hook) for hook in train], [(4, hook) for hook in val] * 3
    assert hooks == sanity + window + last + validated
    assert all({name.partition("/")[2] for name in metrics} == FIGURES for _, metrics in rows)
    assert all(0 <= value <= 100 for _, metrics in rows for value in metrics.values())


def test_chosen_figures_alone() -> None:
    rows = rows_of(DeviceStatsMonitor(filter_keys={"cpu_vm_percent"}))
    assert {name.partition("/")[2] for _, metrics in rows for name in metrics} == {"cpu_vm_percent"}


def test_it_is_bound_to_nothing_where_it_has_nothing_to_log() -> None:
    logger = RecordingLogger()
    for monitor, every in ((DeviceStatsMonitor(cpu_stats=False), 1), (DeviceStatsMonitor(), 0)):
        made = trainer(max_epochs=1, logger=logger, callbacks=[monitor], log_every_n_steps=every)
        assert not {name for name in monitor.live_hooks(made) if "batch" in name}
        made.fit(OneLayer(), loader(2))
    assert logger.rows == []


def test_figures_of_a_cuda_device_come_from_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 7, "num_ooms": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(stats))
    device = torch.device("cuda", 0)
    assert DeviceStatsMonitor()._stats(device) == stats
    assert set(DeviceStatsMonitor(cpu_stats=True)._stats(device)) == {*stats, *FIGURES}
    assert DeviceStatsMonitor(filter_keys=["num_ooms"])._stats(device) == {"num_ooms": 0}


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="'cpu_percent'"):
        DeviceStatsMonitor(filter_keys="cpu_percent")
    with pytest.raises(MisconfigurationException, match="logger"):
        trainer(max_epochs=1, callbacks=[DeviceStatsMonitor()]).fit(OneLayer(), loader(1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="psutil"):
        rows_of(DeviceStatsMonitor())
