"""Ours against a loop by hand: the same losses, honest ratios, and borders that no measured step contains."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, shuffled, trainer

import lit_fast
from lit_fast.callbacks import EarlyStopping, ModelCheckpoint
from lit_fast.errors import ProfileError
from lit_fast.profiler import files, record
from lit_fast.profiler.compare import FIRST_LOSSES, Prepared, against_report, differ, largest_difference
from lit_fast.profiler.ratios import bootstrap, row, rows
from lit_fast.profiler.record import Comparison


def compared(module: Any, data: Any, size: int = 4, windows: int = 6, **options: Any) -> Comparison:
    made = trainer(**{"max_epochs": -1, **options})
    return Prepared(made, module, data).against_eager(size, windows)[0]


def of(comparison: Comparison, name: str) -> Any:
    return next(row for row in comparison.rows if row.name == name)


def test_same_losses_and_rows_that_add_up() -> None:
    comparison = compared(Plain(), shuffled(40), accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert comparison.against == "eager" and comparison.windows == 6 and comparison.steps == 4
    assert comparison.largest_loss_difference == 0.0 and comparison.loss_bound == 1e-5
    step = of(comparison, "step")
    for index in range(6):
        for side in ("ours_windows", "baseline_windows"):
            parts = sum(getattr(row, side)[index] for row in comparison.rows if row.name != "step")
            assert parts == pytest.approx(getattr(step, side)[index], rel=1e-9)
    assert {"data", "forward", "backward", "optimizer"} <= {row.name for row in comparison.rows}
    assert all(row.low <= row.ratio <= row.high for row in comparison.rows if row.baseline)


def test_a_planted_difference_in_the_loss_is_found() -> None:
    class Differs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (1.0 + 1e-3 * isinstance(self.trainer, lit_fast.Trainer))

    comparison = compared(Differs(), batches(10))
    assert comparison.largest_loss_difference is not None and comparison.loss_bound is not None
    assert comparison.largest_loss_difference > 5e-4
    assert comparison.largest_loss_difference > comparison.loss_bound


def test_a_planted_slow_hook_is_a_ratio_above_one() -> None:
    class Slow(lit_fast.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            time.sleep(0.01)

    comparison = compared(Plain(), batches(10), callbacks=[Slow()])
    step, hooks = of(comparison, "step"), of(comparison, "hooks")
    assert step.low > 1.0 and step.ours - step.baseline > 0.0
    assert hooks.ours >= 0.01 and hooks.baseline == 0.0 and hooks.ratio != hooks.ratio


def test_what_runs_at_a_border_is_in_no_step() -> None:
    """The other side is slower by far: none of it may be found on ours."""

    class SlowByHand(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not isinstance(self.trainer, lit_fast.Trainer):
                time.sleep(0.03)
            return super().training_step(batch, batch_idx)

    comparison = compared(SlowByHand(), batches(10), size=2)
    step = of(comparison, "step")
    assert step.baseline > 0.03 > step.ours and step.high < 1.0


def test_each_side_has_random_numbers_of_its_own() -> None:
    class Draws(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch + torch.randn_like(batch), batch_idx) * random.random()

    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    assert compared(Draws(), batches(50), windows=7).largest_loss_difference == 0.0
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_the_program_keeps_its_module_and_its_loader() -> None:
    module, data = Plain(), shuffled(40, generator=torch.Generator().manual_seed(1))
    weights, seed = module.net[0].weight.clone(), data.generator.get_state()
    compared(module, data)
    assert torch.equal(module.net[0].weight, weights) and torch.equal(data.generator.get_state(), seed)
    assert module._trainer is None and module.losses == []


def test_callbacks_that_stop_or_save_are_left_out(tmp_path: Any) -> None:
    made = lit_fast.Trainer(
        accelerator="cpu", max_epochs=-1, default_root_dir=tmp_path, enable_progress_bar=False, logger=True,
        callbacks=[EarlyStopping("val"), ModelCheckpoint(monitor="val"), lit_fast.callbacks.LearningRateMonitor()],
    )  # fmt: skip
    comparison, _ = Prepared(made, Plain(), batches(10)).against_eager(3, 6)
    assert comparison.largest_loss_difference == 0.0
    assert "EarlyStopping" in comparison.notes[0] and "ModelCheckpoint" in comparison.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_manual_optimization_is_compared_by_the_losses_of_its_backwards() -> None:
    class Manual(Plain):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    comparison = compared(Manual(), batches(10))
    assert comparison.largest_loss_difference == 0.0
    for phase in ("forward", "backward", "optimizer"):
        row = of(comparison, phase)
        assert row.ours > 0.0 and row.baseline > 0.0, "both sides are split alike"


def test_errors() -> None:
    with pytest.raises(ProfileError, match="can be read only once"):
        compared(Plain(), iter(batches(3)))
    with pytest.raises(ProfileError, match=r"after 2 windows of 4 micro-batches.*max_steps"):
        compared(Plain(), batches(10), max_epochs=1)
    with pytest.raises(ProfileError, match="compiled"):
        compared(torch.nn.Linear(1, 1), batches(3))

    class Holds(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.held = (number for number in range(3))

    with pytest.raises(ProfileError, match="Holds cannot be copied"):
        compared(Holds(), batches(3))


def test_data_without_a_length_is_compared_too() -> None:
    assert compared(Plain(), NoLength(batches(11))).largest_loss_difference == 0.0


def test_largest_difference() -> None:
    def losses(*values: float) -> list[torch.Tensor]:
        return [torch.tensor(value, dtype=torch.float64) for value in values]

    assert largest_difference(losses(1.0, 2.0), losses(1.0, 2.0, 7.0)) == 0.0
    assert largest_difference(losses(1.0, 2.2), losses(1.0, 2.0)) == pytest.approx(0.2 / 2.2)
    assert largest_difference(losses(1.0, 3.0), losses(2.0, 2.0), steps=2) == 0.0
    assert largest_difference(losses(100.0, 1e-9), losses(100.0, 2e-9)) == pytest.approx(1e-8)
    assert largest_difference(losses(float("nan")), losses(float("nan"))) == 0.0
    assert largest_difference(losses(float("nan")), losses(1.0)) == float("inf")
    assert largest_difference([], losses(1.0)) is None


def test_only_the_first_losses_are_compared_one_by_one() -> None:
    """A bit grows as training carries it on: what it does to single steps later is no fault, what to their means is."""
    losses = [torch.tensor(1.0)] * 200
    chaos = [torch.tensor(1.0 + (0.0 if n < FIRST_LOSSES else 1e-2 * (-1) ** n)) for n in range(200)]
    assert differ(losses, chaos, 20, few_bits=False) == (0.0, 1e-5)
    early = [torch.tensor(1.0 + (1e-4 if n == FIRST_LOSSES - 1 else 0.0)) for n in range(200)]
    difference, bound = differ(losses, early, 20, few_bits=False)
    assert difference is not None and difference > bound == 1e-5
    late = [torch.tensor(1.0 + (0.1 if n > 150 else 0.0)) for n in range(200)]
    difference, bound = differ(losses, late, 20, few_bits=False)
    assert difference is not None and difference > bound == 2e-2
    assert differ(losses, late, 20, few_bits=True) == (difference, bound)


def test_losses_that_are_nan_are_told() -> None:
    class Nan(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx > 5 else 1.0)

    notes = compared(Nan(), batches(40), size=2, accumulate_grad_batches=2).notes
    assert any("losses are not finite" in note for note in notes)
    assert "a step is a micro-batch; the optimizer takes one in 2" in notes


def test_the_bootstrap_finds_a_known_ratio() -> None:
    generator = torch.Generator().manual_seed(4)
    drift = torch.rand(20, generator=generator).double() + 1.0  # a machine that others use
    ours = (1.1 * drift * (1.0 + 0.01 * torch.randn(20, generator=generator).double())).tolist()
    ratio, low, high = bootstrap(ours, drift.tolist(), paired=True)
    assert low < 1.1 < high and high - low < 0.03 and low <= ratio <= high
    assert bootstrap(ours, drift.tolist(), paired=True) == (ratio, low, high)  # a fixed seed
    _, wide_low, wide_high = bootstrap(ours, drift.tolist(), paired=False)
    assert wide_high - wide_low > 5 * (high - low)  # what pairs are for


def test_rows_without_a_baseline_can_be_written_and_read(tmp_path: Any) -> None:
    windows = [{"forward": 1.0, "hooks": 0.5, "unexplained": 0.25, "validation": 9.0}] * 5
    made = rows(windows, [{"forward": 0.5, "unexplained": 0.25}] * 5, paired=True)
    assert [(row.name, row.ours, row.baseline) for row in made] == [
        ("forward", 1.0, 0.5), ("hooks", 0.5, 0.0), ("unexplained", 0.25, 0.25), ("step", 1.75, 0.75),
    ]  # fmt: skip
    files.write(record.Report(comparison=Comparison("eager", made)), tmp_path / "report.json")
    again = files.read(tmp_path / "report.json")
    assert isinstance(again, record.Report) and again.comparison is not None
    assert repr(again.comparison.rows) == repr(made)
    assert row("x", [2.0] * 5, [1.0] * 5, paired=False).ratio == 2.0


def test_a_report_without_windows_is_refused() -> None:
    made = record.Report([record.Profile()])
    with pytest.raises(ProfileError, match=r"old\.json holds no windows"):
        against_report(made, record.Profile(), "old.json", 5)
    short = record.Profile(windows=[{"forward": 1.0}] * 5)
    with pytest.raises(ProfileError, match="There are 5 windows"):
        against_report(record.Report([short]), short, "old.json", 5)


def test_what_differs_between_two_runs_is_said() -> None:
    windows = [{"forward": 1.0, "checkpoint": 5.0}] * 8
    now = record.Profile(record.Header(host="a", cores=2, versions={"torch": "2.13"}), windows=windows)
    then = record.Profile(record.Header(host="b", cores=2, versions={"torch": "2.12", "cuda": "13"}), windows=windows)
    comparison = against_report(record.Report([now]), record.Report([then]), "old.json", 5)
    assert comparison.notes[1:] == ["host: b then, a now", "cuda: 13 then, None now", "torch: 2.12 then, 2.13 now"]
    assert of(comparison, "step").ratio == 1.0 and of(comparison, "step").ours == 1.0  # no checkpoint in a step
