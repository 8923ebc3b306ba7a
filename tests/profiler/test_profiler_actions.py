"""Lightning's named actions: who is recorded and how often, what the profilers report, what a run without one costs.

goldens/actions_lightning_2_6_6.json holds how often Lightning 2.6.6 records each action in the programs below.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_fast
from lit_fast.demos import BoringDataModule, BoringModel
from lit_fast.errors import MisconfigurationException
from lit_fast.profiler import AdvancedProfiler, PassThroughProfiler, Profiler, PyTorchProfiler, SimpleProfiler

RECORD = json.loads((Path(__file__).parents[1] / "goldens" / "actions_lightning_2_6_6.json").read_text())


class Record(Profiler):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []

    def start(self, action_name: str) -> None:
        self.names.append(action_name)
        self.open.append(action_name)

    def stop(self, action_name: str) -> None:
        self.open.remove(action_name)


class CB(lit_fast.Callback):
    def on_train_batch_end(self, *args: Any) -> None: ...

    def on_validation_epoch_end(self, *args: Any) -> None: ...


class M(BoringModel):
    def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.trainer.profiler.profile("mine"):
            return super().training_step(batch, batch_idx)


def trainer(tmp_path: Path, **options: Any) -> lit_fast.Trainer:
    given = {
        "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 1,
        "limit_predict_batches": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": tmp_path, "accelerator": "cpu",
    }  # fmt: skip
    return lit_fast.Trainer(**{**given, **options})


def runs_nothing(action: str) -> bool:
    """A hook that neither M nor CB overrides, or a call to a strategy with nothing to do on one CPU."""
    owner, _, name = action.partition(".")
    if owner.startswith("[Callback]"):
        return getattr(CB, name) is getattr(lit_fast.Callback, name)
    if owner.startswith("[LightningModule]"):
        hook = getattr(lit_fast.LightningModule, name)
        return getattr(M, name) is hook and name not in ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step")
    return owner.startswith("[Strategy]") and (name.startswith("on_") or name == "batch_to_device")


@pytest.mark.parametrize("program", sorted(RECORD))
def test_actions_and_their_counts_are_lightnings(program: str, tmp_path: Path) -> None:
    profiler = Record()
    made = trainer(tmp_path, profiler=profiler, callbacks=[CB()], accumulate_grad_batches=2 if program == "acc" else 1)
    data = {"datamodule": BoringDataModule()} if program == "dm" else {}
    getattr(made, program if program in ("validate", "test", "predict") else "fit")(M(), **data)
    recorded, expected = Counter(profiler.names), RECORD[program]
    assert recorded.pop("mine", 0) == (0 if program in ("validate", "test", "predict") else 6)
    assert {name: expected.get(name) for name in recorded} == recorded
    assert [name for name in expected if name not in recorded and not runs_nothing(name)] == []
    assert profiler.open == []


def test_without_a_profiler_user_code_can_ask_for_it(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.fit(M())
    assert type(made.profiler) is PassThroughProfiler and made.profiler is made.profiler
    assert made._actions is None
    step = made.fit_loop.plans.whole.training_step  # type: ignore[union-attr]
    assert step.__func__ is M.training_step  # type: ignore[attr-defined]


def test_simple_reports_each_action_into_a_file_of_the_stage(tmp_path: Path) -> None:
    profiler = SimpleProfiler(dirpath=tmp_path, filename="times")
    made = trainer(tmp_path, profiler=profiler)
    made.fit(M())
    made.validate(M())
    report = (tmp_path / "fit-times.txt").read_text()
    row = next(line for line in report.splitlines() if "run_training_batch" in line)
    assert row.split()[3] == "6"  # action, mean, total, calls, share
    assert "[Strategy]SingleDeviceStrategy.validation_step" in (tmp_path / "validate-times.txt").read_text()
    assert len(profiler.recorded_durations["mine"]) == 6


def test_a_report_without_a_file_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lit_fast"):
        trainer(tmp_path, profiler="simple").fit(M())
    assert any("[LightningModule]M.optimizer_step" in message for message in caplog.messages)


def test_an_exception_stops_the_action() -> None:
    profiler = SimpleProfiler(extended=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), profiler.profile("work"):
            raise RuntimeError("inside")
    assert len(profiler.recorded_durations["work"]) == 2 and not profiler.current_actions
    assert "work" in profiler.summary() and "calls" not in profiler.summary()
    with pytest.raises(ValueError, match="never started"):
        profiler.stop("work")
    profiler.start("work")
    with pytest.raises(ValueError, match="already started"):
        profiler.start("work")


def test_advanced_names_functions_and_dumps_them(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="calls", dump_stats=True, line_count_restriction=5)
    trainer(tmp_path, profiler=profiler).fit(M())
    report = (tmp_path / "fit-calls.txt").read_text()
    assert "-- run_training_epoch" in report and "-- [Strategy]SingleDeviceStrategy.backward" in report
    assert list(tmp_path.glob("fit-calls-mine.prof"))
    with pytest.raises(ValueError, match="never started"):
        profiler.stop("mine")
    alone = AdvancedProfiler(dump_stats=True)
    with pytest.raises(MisconfigurationException, match="dirpath"):
        alone.summary()


@pytest.mark.parametrize("schedule", [None, torch.profiler.schedule(wait=0, warmup=1, active=2)])
def test_pytorch_shows_operators_and_writes_traces(tmp_path: Path, schedule: Any) -> None:
    """All rows of the table: which operator is among the first twenty is a matter of microseconds."""
    options: dict[str, Any] = {"row_limit": -1, "sort_by_key": "cpu_time_total"}
    if schedule is not None:
        options["schedule"] = schedule
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="operators", **options)
    made = trainer(tmp_path, profiler=profiler, num_sanity_val_steps=0)
    module = M()
    made.fit(module)
    assert "aten::linear" in (tmp_path / "fit-operators.txt").read_text()
    traces = [path.read_text() for path in tmp_path.glob("*.pt.trace.json")]
    assert any("[pl][module]torch.nn.modules.linear.Linear: layer" in trace for trace in traces)
    assert any("[pl][profile][Strategy]SingleDeviceStrategy.training_step" in trace for trace in traces)
    assert not module.layer._forward_hooks and not module.layer._forward_pre_hooks


def test_pytorch_refuses_what_it_cannot_use() -> None:
    with pytest.raises(MisconfigurationException, match="sort_by_key='speed'"):
        PyTorchProfiler(sort_by_key="speed")
    with pytest.raises(MisconfigurationException, match="ProfilerAction"):
        PyTorchProfiler(schedule=lambda step: step)
