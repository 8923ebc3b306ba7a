"""Validation: modes, random numbers, gradients, limits, and what it returns."""

from __future__ import annotations

import signal
from multiprocessing import active_children
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_fast.data import worker_signals
from lit_fast.data.combined import CombinedLoader
from lit_fast.errors import DataError, MisconfigurationException


class Validates(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.modes: list[tuple[bool, bool, bool, bool]] = []
        self.batches_seen = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        modes = self.training, self.dropout.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.modes.append(modes)
        self.batches_seen += 1
        self.log("val", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


@pytest.mark.parametrize("inference", [True, False])
def test_modes_inside_and_after(inference: bool) -> None:
    """Inside a fit there is no inference mode, whatever the option says, as in Lightning."""

    class Checks(Validates):
        def on_train_epoch_start(self) -> None:
            assert self.training and self.dropout.training and torch.is_grad_enabled()
            self.frozen.eval()

    model = Checks()
    fitted(model, batches(3), [batches(2)], max_epochs=2, inference_mode=inference, num_sanity_val_steps=0)
    assert model.modes == [(False, False, False, False)] * 4
    assert model.training and model.dropout.training and not model.frozen.training
    model.modes.clear()
    for method in ("validate", "test"):
        getattr(trainer(inference_mode=inference), method)(model, [batches(1)], verbose=False)
    assert model.modes == [(False, False, False, inference)] * 2
    assert model.training and model.dropout.training and not model.frozen.training


@pytest.mark.parametrize("sanity,seen", [(0, 6), (2, 8), (-1, 9), (None, 8)])
def test_sanity_check(sanity: int | None, seen: int) -> None:
    model = Validates()
    made = fitted(model, batches(3), [batches(3)], max_epochs=2, num_sanity_val_steps=sanity)
    assert model.batches_seen == seen
    assert made.num_val_batches == [3]


def test_sanity_check_leaves_no_value_and_no_random_number() -> None:
    class Draws(Validates):
        def on_train_start(self) -> None:
            self.drawn = torch.rand(())
            self.published = dict(self.trainer.callback_metrics)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)
            self.log("val", 1.0)

    drawn = []
    for steps in (0, 2):
        torch.manual_seed(5)
        model = Draws()
        fitted(model, batches(1), [batches(2)], max_epochs=1, num_sanity_val_steps=steps)
        assert model.published == {}
        drawn.append(model.drawn)
    assert drawn[0] == drawn[1]


def test_gradients_are_released_before_validation_and_kept_inside_a_window() -> None:
    class Looks(Validates):
        def on_validation_start(self) -> None:
            if not self.trainer.sanity_checking:
                self.grads.append(any(p.grad is not None for p in self.parameters()))

    for window, expected in ((1, [False, False]), (4, [True, False])):
        model = Looks()
        model.grads = []
        fitted(model, batches(4), [batches(1)], max_epochs=1, val_check_interval=2, accumulate_grad_batches=window)
        assert model.grads == expected


@pytest.mark.parametrize("limit,seen", [(1, 1), (0.5, 2), (1.0, 4), (100, 4)])
def test_limit_val_batches(limit: float, seen: int) -> None:
    model = Validates()
    trainer(limit_val_batches=limit).validate(model, batches_loader(4), verbose=False)
    assert model.batches_seen == seen


def batches_loader(count: int) -> Any:
    return [batches(count)]


def test_validate_returns_the_weighted_mean() -> None:
    model = Validates()
    data = [torch.randn(size, 8, generator=torch.Generator().manual_seed(size)) for size in (4, 2)]
    result = trainer().validate(model, [data], verbose=False)
    with torch.no_grad():
        values = [model.loss(batch).item() for batch in data]
    assert result == [{"val": torch.tensor((values[0] * 4 + values[1] * 2) / 6).item()}]


def test_wrong_data_and_steps() -> None:
    with pytest.raises(MisconfigurationException, match="defines no validation_step"):
        trainer().validate(Plain(), [batches(1)])
    with pytest.raises(MisconfigurationException, match="No validation data"):
        trainer().validate(Validates())
    with pytest.raises(MisconfigurationException, match="needs a model"):
        trainer().validate()
    with pytest.raises(DataError, match="validation data is int"):
        trainer().validate(Validates(), 3)
    with pytest.raises(MisconfigurationException, match="does not take `dataloader_idx`"):
        trainer().validate(Validates(), [NoLength(batches(1)), NoLength(batches(1))])


def test_mapping_of_loaders() -> None:
    class Two(Validates):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("v", float(dataloader_idx), add_dataloader_idx=True)

    result = trainer().validate(Two(), {"a": NoLength(batches(1)), "b": NoLength(batches(1))}, verbose=False)
    assert [set(row) for row in result] == [{"v/dataloader_idx_0"}, {"v/dataloader_idx_1"}]


def test_the_modules_own_loader_is_asked_for_once() -> None:
    class Owns(Validates):
        asked = 0

        def val_dataloader(self) -> Any:
            self.asked += 1
            return NoLength(batches(2))

    model = Owns()
    fitted(model, batches(3), max_epochs=3)
    assert model.asked == 1 and model.batches_seen == 2 + 3 * 2


def test_the_table_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    trainer().test(Validates(), [batches(1)])
    printed = capsys.readouterr().out
    header, row = (line for line in printed.splitlines() if "metric" in line or "val" in line)
    assert header == f"┃{'Test metric':^27}┃{'DataLoader 0':^27}┃"
    assert [len(cell) for cell in row.strip("│").split("│")] == [27, 27] and row[1:28] == f"{'val':^27}"


def test_a_metric_object_is_read_when_its_loader_ends() -> None:
    """Two loaders share one object, and a hook resets it: neither changes a value that was complete."""
    torchmetrics = pytest.importorskip("torchmetrics")

    class Shares(Validates):
        def __init__(self) -> None:
            super().__init__()
            self.metric = torchmetrics.SumMetric()

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
            self.metric(1.0)
            self.log("sum", self.metric, on_epoch=True)

        def on_test_epoch_end(self) -> None:
            self.metric.reset()

    result = trainer().test(Shares(), [batches(2), batches(3)], verbose=False)
    assert result == [{"sum/dataloader_idx_0": 2.0}, {"sum/dataloader_idx_1": 5.0}]


def test_signatures_that_do_not_fit_the_loaders() -> None:
    class Needs(Validates):
        def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
            """Cannot be called for one loader."""

    with pytest.raises(MisconfigurationException, match="give it a default: dataloader_idx=0"):
        trainer().test(Needs(), [batches(1)])
    with pytest.raises(MisconfigurationException, match="does not take `dataloader_idx`"):
        trainer().test(Needs(), [batches(1), batches(1)])


def test_a_stage_without_its_step_or_data() -> None:
    with pytest.raises(MisconfigurationException, match="defines no test_step"):
        trainer().test(Plain(), [batches(1)])
    with pytest.raises(MisconfigurationException, match="No test data"):
        trainer().test(Validates())
    with (
        pytest.raises(MisconfigurationException, match="ckpt_path='best'"),
        pytest.warns(match="best checkpoint"),
    ):
        fitted(Validates(), batches(1), max_epochs=1).test(dataloaders=[batches(1)])


def test_between_two_steps_that_nobody_hooks_no_python_function_runs() -> None:
    """What 1,000 tiny batches cost (benchmarks/validation.py) is decided by how little stands between two steps."""
    import sys

    called: list[str] = []
    model = Validates()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    made = trainer()
    loop, run = made.validate_loop, made.validate_loop._run_loader

    def watched(*args: Any) -> None:
        sys.setprofile(lambda frame, event, arg: called.append(frame.f_code.co_name) if event == "call" else None)
        try:
            run(*args)
        finally:
            sys.setprofile(None)

    loop._run_loader = watched  # type: ignore[method-assign]
    made.validate(model, [batches(50)], verbose=False)
    assert called.count("<lambda>") == 50
    assert len(called) <= 50 + 5, f"once for the loader, not for each batch: {sorted(set(called))}"


# -- signals


class Handlers(Dataset[Any]):
    """Each row says whether its worker leaves SIGTERM to the training process."""

    own = 0.0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(signal.getsignal(signal.SIGTERM) is worker_signals._last_orders), self.own])


def own_init(worker_id: int) -> None:
    torch.utils.data.get_worker_info().dataset.own = 1.0


@pytest.mark.parametrize("several", [False, True])
def test_workers_of_a_validation_leave_signals_to_it(several: bool) -> None:
    class Collects(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.rows += batch[0].tolist() if several else batch.tolist()

    model, loader = Collects(), DataLoader(Handlers(), 2, num_workers=1, worker_init_fn=own_init)
    data = CombinedLoader([loader], "min_size") if several else loader
    before = set(active_children())  # of earlier tests
    made = fitted(model, batches(1), data, max_epochs=1, num_sanity_val_steps=0)
    assert model.rows == [[1.0, 1.0]] * 4 and loader.worker_init_fn is own_init
    model.rows = []
    made.validate(model, data, verbose=False)
    assert model.rows == [[1.0, 1.0]] * 4
    assert set(active_children()) <= before
