"""`self.log`: what is kept, how it is reduced, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, trainer
from torch import Tensor

import lit_fast
from lit_fast.errors import MisconfigurationException, PossibleUserWarning
from lit_fast.log_rules import batch_size_of


class Logs(Plain):
    """`what(module, batch, batch_idx)` logs; everything the trainer publishes is remembered after each step."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what
        self.seen: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.what(self, batch, batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})


def test_a_value_changed_in_place_after_log_stays() -> None:
    def what(module: Logs, batch: Any, batch_idx: int) -> None:
        value = torch.tensor(float(batch_idx))
        module.log("value", value, on_step=True, on_epoch=True)
        value.fill_(100.0)

    model = Logs(what)
    made = fitted(model, batches(4), max_epochs=1)
    assert [seen["value"] for seen in model.seen] == [0.0, 1.0, 2.0, 3.0]
    assert made.callback_metrics["value_epoch"] == 1.5


@pytest.mark.parametrize(
    "value,expected",
    [
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor([2.5]), 2.5),
        pytest.param(torch.tensor(3, dtype=torch.int64), 3.0, marks=pytest.mark.filterwarnings("ignore:self.log")),
        pytest.param(torch.tensor(True), 1.0, marks=pytest.mark.filterwarnings("ignore:self.log")),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (True, 1.0),
        (7, 7.0),
        (0.25, 0.25),
        (math.nan, math.nan),
    ],
)
def test_values(value: Any, expected: float) -> None:
    model = Logs(lambda module, batch, index: module.log("value", value, prog_bar=True))
    made = fitted(model, batches(1), max_epochs=1)
    for published in (made.callback_metrics, made.logged_metrics):
        got = published["value"]
        assert isinstance(got, Tensor) and got.dim() == 0 and got.dtype == torch.float32 and not got.requires_grad
        assert got.item() == expected or math.isnan(expected)
    shown = made.progress_bar_metrics["value"]
    assert type(shown) is float and (shown == expected or math.isnan(expected))


def test_numpy_scalars() -> None:
    numpy = pytest.importorskip("numpy")
    for value in (numpy.float64(0.5), numpy.float32(0.5), numpy.array([0.5])):
        made = fitted(Logs(lambda module, batch, index, v=value: module.log("v", v)), batches(1), max_epochs=1)
        assert made.callback_metrics["v"] == 0.5


@pytest.mark.parametrize("value", [torch.ones(2), "0.5", None, [1.0], {"a": 1.0}, object(), torch.ones(0)])
def test_wrong_values(value: Any) -> None:
    with pytest.raises(ValueError, match=r"self.log\('value'"):
        fitted(Logs(lambda module, batch, index: module.log("value", value)), batches(1), max_epochs=1)


@pytest.mark.parametrize(
    "reduce_fx,expected",
    [("mean", (0 * 4 + 1 * 2 + 2 * 6) / 12), ("sum", 3.0), ("min", 0.0), ("max", 2.0), (torch.mean, 14 / 12),
     (max, 2.0), (torch.sum, 3.0)],
)  # fmt: skip
def test_reductions_over_the_epoch(reduce_fx: Any, expected: float) -> None:
    """A mean is weighted by the batch sizes 4, 2 and 6."""
    data = [torch.randn(size, 8) for size in (4, 2, 6)]
    what = lambda module, batch, index: module.log("v", float(index), on_step=True, on_epoch=True, reduce_fx=reduce_fx)  # noqa: E731
    made = fitted(Logs(what), data, max_epochs=1)
    assert made.callback_metrics["v_epoch"].item() == torch.tensor(expected).item()
    assert made.callback_metrics["v"] == made.callback_metrics["v_epoch"]
    assert made.callback_metrics["v_step"] == 2.0


def test_batch_size_given() -> None:
    def what(module: Logs, batch: Any, index: int) -> None:
        module.log("v", float(index), on_epoch=True, on_step=False, batch_size=index + 1)

    made = fitted(Logs(what), batches(3), max_epochs=1)
    assert made.callback_metrics["v"].item() == torch.tensor((0 * 1 + 1 * 2 + 2 * 3) / 6).item()


def test_epochs_do_not_mix() -> None:
    what = lambda module, batch, index: module.log("v", float(module.current_epoch), on_step=False, on_epoch=True)  # noqa: E731
    model = Logs(what)
    made = fitted(model, batches(3), max_epochs=3)
    assert made.callback_metrics["v"] == 2.0
    assert model.seen[-1]["v"] == 1.0, "until the third epoch ends, the second one's value is there"


def test_log_dict_and_names() -> None:
    def what(module: Logs, batch: Any, batch_idx: int) -> None:
        module.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, prog_bar=True, logger=False)

    made = fitted(Logs(what), batches(1), max_epochs=1)
    assert set(made.callback_metrics) == {"a", "b"}
    assert set(made.logged_metrics) == set()
    assert made.progress_bar_metrics == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    "options,message",
    [
        ({"reduce_fx": "median"}, "reduce_fx='median'.*'mean', 'sum', 'min', 'max'"),
        ({"reduce_fx": lambda values: values}, "allowed are 'mean'"),
        ({"on_step": False, "on_epoch": False}, "would log nothing"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fitted(Logs(lambda module, batch, index: module.log("v", 1.0, **options)), batches(1), max_epochs=1)


def test_different_options_for_one_name() -> None:
    def what(module: Logs, batch: Any, batch_idx: int) -> None:
        module.log("v", 1.0, prog_bar=batch_idx > 0)

    with pytest.raises(MisconfigurationException, match=r"twice in `training_step` .*prog_bar=False"):
        fitted(Logs(what), batches(2), max_epochs=1)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_end", "on_fit_start", "setup", "configure_optimizers"])
def test_hooks_where_nothing_can_be_logged(hook: str) -> None:
    def log(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.log("v", 1.0)

    body = {hook: log, "validation_step": lambda self, batch, batch_idx: None}
    with pytest.raises(MisconfigurationException, match=r"self.log\('v'"):
        fitted(type("Model", (Plain,), body)(), batches(1), [batches(1)], max_epochs=1)


def test_on_step_in_an_epoch_hook() -> None:
    class Model(Plain):
        def on_train_epoch_end(self) -> None:
            self.log("v", 1.0, on_step=True)

    with pytest.raises(MisconfigurationException, match="runs once an epoch"):
        fitted(Model(), batches(1), max_epochs=1)


def test_without_a_trainer_it_warns() -> None:
    with pytest.warns(UserWarning, match="not attached to a Trainer"):
        Plain().log("v", 1.0)


def test_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.mean(float(batch_idx + 10 * self.current_epoch))
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    model = Model()
    made = fitted(model, batches(4), max_epochs=2)
    assert made.callback_metrics["mean_epoch"] == 11.5, "reset between epochs"
    assert made.callback_metrics["mean_step"] == 13.0
    assert model.mean.update_count == 0


@pytest.mark.parametrize(
    "batch,size",
    [
        (torch.ones(3, 2), 3),
        (torch.ones(()), 1),
        ({"a": "text", "b": torch.ones(5)}, 5),
        ([[torch.ones(2)], torch.ones(2, 7)], 2),
        ((3, torch.ones(6, 1)), 6),
    ],
)
def test_batch_size_of(batch: Any, size: int) -> None:
    assert batch_size_of(batch) == size


def test_batch_size_of_nothing() -> None:
    for batch in (object(), ["one", "two"], []):
        with pytest.raises(MisconfigurationException, match="batch_size=n"):
            batch_size_of(batch)


def test_an_ambiguous_batch_size_warns_where_the_user_logs() -> None:
    what = lambda module, batch, index: module.log("v", 1.0, on_epoch=True)  # noqa: E731
    with pytest.warns(PossibleUserWarning, match="weighs this batch by 2") as heard:
        fitted(Logs(what), [[torch.randn(2, 8), torch.randn(3)]], max_epochs=1)
    assert heard[0].filename == __file__


def test_log_costs_no_table_when_unused() -> None:
    made = fitted(Plain(), batches(3), max_epochs=1)
    assert made.callback_metrics == {} and made.logged_metrics == {} and made.progress_bar_metrics == {}


def test_state_goes_on_in_the_middle_of_an_epoch() -> None:
    from lit_fast.metrics import MetricLog

    module = Plain()

    def fill(log: MetricLog, values: list[float]) -> None:
        log.current, log.batch = log.table("training_step", "train"), torch.ones(4, 1)
        module.__dict__["_metric_log"], module.__dict__["_trainer"] = log, object()
        for value in values:
            module.log("mean", value, on_step=True, on_epoch=True, reduce_fx=torch.mean)
            module.log("max", value, on_step=False, on_epoch=True, reduce_fx="max")
            module.log("step", value, prog_bar=True)

    straight, first, second = MetricLog(), MetricLog(), MetricLog()
    fill(straight, [1.0, 5.0, 2.0])
    fill(first, [1.0, 5.0])
    second.load_state_dict(first.state_dict(module), module)
    fill(second, [2.0])
    for log in (straight, second):
        log.epoch_end = True
    assert straight.callback_metrics() == second.callback_metrics()
    assert second.callback_metrics()["max"] == 5.0


def test_a_program_may_log_differently_after_a_resume() -> None:
    from lit_fast.metrics import MetricLog

    module, first, second = Plain(), MetricLog(), MetricLog()
    module.__dict__["_trainer"] = object()
    for log, options in ((first, {}), (second, {"prog_bar": True})):
        log.current = log.table("training_step", "train")
        module.__dict__["_metric_log"] = log
        if log is second:
            second.load_state_dict(first.state_dict(module), module)
        module.log("v", 1.0, **options)
    assert second.progress_bar_metrics() == {"v": 1.0}


class Counts(Plain):
    """Metrics logged as objects, kept by hand, and of validation."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import CatMetric, MeanMetric

        self.logged, self.by_hand, self.validated = MeanMetric(), CatMetric(), MeanMetric()
        self.results: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.logged(batch.sum())
        self.by_hand.update(batch.sum())
        self.log("logged", self.logged, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.update(batch.sum() + batch_idx)
        self.log("validated", self.validated)

    def on_train_epoch_end(self) -> None:
        self.results.append(self.by_hand.compute().tolist())
        self.by_hand.reset()


@pytest.mark.parametrize("at", [2, 3, 5])  # inside an epoch, in the hook after a validation, inside the second epoch
def test_metric_objects_survive_a_checkpoint_inside_an_epoch(tmp_path: Any, at: int) -> None:
    pytest.importorskip("torchmetrics")

    class Saves(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == at and at != 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

        def on_validation_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == at == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    data, val = batches(4), [batches(2, seed=5)]
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 3, "num_sanity_val_steps": 0}
    straight, resumed = Counts(), Counts()
    first = trainer(callbacks=Saves(), **options)
    first.fit(straight, data, val)
    second = trainer(**options)
    second.fit(resumed, data, val, ckpt_path=tmp_path / "a.ckpt")
    assert second.callback_metrics == first.callback_metrics
    assert resumed.results == straight.results[-len(resumed.results) :] and len(resumed.results) == (2 if at < 4 else 1)
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["lit_fast"]["metrics"]["metrics"]
    assert set(held) == {"logged", "by_hand"}


def test_another_run_may_log_differently() -> None:
    made = trainer(max_epochs=1)
    made.fit(Logs(lambda module, batch, index: module.log("v", 1.0)), batches(1))
    made.fit(Logs(lambda module, batch, index: module.log("v", 2.0, prog_bar=True)), batches(1))


def test_two_metrics_under_one_name() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for metric in (self.first, self.second):
                metric(1.0)
                self.log("m", metric)

    with pytest.raises(MisconfigurationException, match="two different metrics"):
        fitted(Model(), batches(1), max_epochs=1)


def test_a_nested_module_logs_into_the_hook_that_runs() -> None:
    class Inner(lit_fast.LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            self.log("inner", x.sum(), on_epoch=True)
            assert self.global_step == self.trainer.global_step
            return x

    class Outer(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(self.inner(batch), batch_idx)

    data = batches(2)
    made = fitted(Outer(), data, max_epochs=1)
    assert made.callback_metrics["inner_step"] == data[1].sum()


def test_logger_asked_for_where_there_is_none() -> None:
    with pytest.warns(UserWarning, match="this Trainer has no logger"):
        fitted(Logs(lambda module, batch, index: module.log("v", 1.0, logger=True)), batches(1), max_epochs=1)


def test_numbers_follow_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = Logs(lambda module, batch, index: module.log("v", 0.1))
        made = fitted(model, [batch.double() for batch in batches(1)], max_epochs=1)
        assert made.callback_metrics["v"].dtype == torch.float64 and made.callback_metrics["v"].item() == 0.1
    finally:
        torch.set_default_dtype(torch.float32)


def test_validation_values_are_there_for_every_loader() -> None:
    class Model(Plain):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("v", float(dataloader_idx))

    made = trainer()
    results = made.validate(Model(), [NoLength(batches(2)), NoLength(batches(3))], verbose=False)
    assert results == [{"v/dataloader_idx_0": 0.0}, {"v/dataloader_idx_1": 1.0}]
