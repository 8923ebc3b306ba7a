"""`self.log(..., sync_dist=True)` in two processes: what loggers and callbacks get, against sums by hand."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import lit_fast

pytestmark = pytest.mark.dist

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 2, "strategy": "ddp", "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip


class Rows(lit_fast.loggers.Logger):
    """Keeps what it is given, in every process."""

    name, version = "rows", 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def of(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


class Logs(lit_fast.LightningModule):
    """Rank 0 sees the values 1, 2, 3, 4 in batches of 1, rank 1 sees 10, 20, 30, 40 in batches of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: dict[str, Any] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        value = batch[0, 0]
        self.log("mean", value, on_step=True, on_epoch=True, sync_dist=True)
        for reduce_fx in ("sum", "min", "max"):
            self.log(reduce_fx, value, on_step=False, on_epoch=True, reduce_fx=reduce_fx, sync_dist=True)
        self.log("summed_step", value, reduce_fx="sum", sync_dist=True)
        self.log("own", value, on_step=False, on_epoch=True)
        if self.global_rank == 0:
            self.log("first", value, on_step=False, on_epoch=True, sync_dist=True, rank_zero_only=True)
        return self.layer(batch).square().mean()

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.global_rank), sync_dist=True)
        self.seen["in_hook"] = float(self.trainer.callback_metrics["mean_epoch"])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch[0, 0], sync_dist=True)
        self.log("val_each", batch[0, 0], on_step=True, on_epoch=False, sync_dist=True)
        self.log_dict({f"many{n}": batch[0, 0] * n for n in range(40)}, sync_dist=True)  # more than one message

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", 1.0 + self.global_rank, sync_dist=True, reduce_fx="max")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches() -> list[Tensor]:
    rank = int(os.environ["RANK"])
    return [torch.full((3, 1) if rank else (1, 1), 10.0 * n if rank else float(n)) for n in range(1, 5)]


def logs() -> dict[str, Any]:
    logger, model = Rows(), Logs()
    trainer = lit_fast.Trainer(logger=logger, max_epochs=2, log_every_n_steps=2, **QUIET)
    trainer.fit(model, batches(), batches())
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = ("mean_step", "summed_step", "own", "val_each")
    seen["rows"] = {name: logger.of(name) for name in names}  # type: ignore[assignment]
    seen.update(model.seen)
    seen["validate"] = trainer.validate(model, batches(), verbose=False)  # type: ignore[assignment]
    return seen


def test_values_are_those_of_all_processes() -> None:
    first, second = run_ranks(logs, 2)
    mean = (1 + 2 + 3 + 4 + 3 * (10 + 20 + 30 + 40)) / (4 + 12)
    for seen in (first, second):
        assert seen["mean_epoch"] == seen["in_hook"] == seen["val"] == mean
        assert (seen["sum"], seen["min"], seen["max"]) == (110.0, 1.0, 40.0)
        assert seen["late"] == 0.5
        assert seen["val_end"] == 2.0
        assert seen["many39"] == pytest.approx(39 * mean)
        assert seen["rows"]["mean_step"] == [11.0, 22.0] * 2  # of steps 2 and 4: the mean of both processes
        assert seen["rows"]["summed_step"] == [22.0, 44.0] * 2
        assert seen["rows"]["val_each"] == [5.5, 11.0, 16.5, 22.0] * 2
        assert seen["validate"] == first["validate"]
        assert seen["validate"][0]["val"] == mean
    assert (first["own"], second["own"]) == (2.5, 25.0)
    assert first["first"] == 2.5 and "first" not in second


class Differ(Logs):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log(f"value_of_{self.global_rank}", 1.0, sync_dist=True, on_step=self.by_step, on_epoch=not self.by_step)
        return self.layer(batch).square().mean()

    on_train_epoch_end = lit_fast.LightningModule.on_train_epoch_end


def different_names(by_step: bool) -> str:
    model = Differ()
    model.by_step = by_step
    trainer = lit_fast.Trainer(logger=Rows(), max_epochs=1, log_every_n_steps=1, **QUIET)
    with pytest.raises(lit_fast.errors.MisconfigurationException) as error:
        trainer.fit(model, batches())
    return str(error.value)


@pytest.mark.parametrize("by_step", [True, False], ids=["step", "epoch"])
def test_different_names_are_an_error_in_every_process(by_step: bool) -> None:
    for message in run_ranks(different_names, 2, by_step):
        assert "value_of_0" in message and "value_of_1" in message


class WithMetric(Logs):
    def __init__(self) -> None:
        super().__init__()
        import torchmetrics

        self.metric = torchmetrics.MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.metric(batch)
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        if self.global_rank == 0:  # whoever reads meanwhile reads alone
            self.seen.setdefault("read", []).append("metric_epoch" in self.trainer.callback_metrics)
        return self.layer(batch).square().mean()

    on_train_epoch_end = lit_fast.LightningModule.on_train_epoch_end


def metrics() -> dict[str, float]:
    trainer = lit_fast.Trainer(logger=Rows(), max_epochs=1, log_every_n_steps=2, **QUIET)
    trainer.fit(WithMetric(), batches())
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_metric_object_asks_the_others_at_the_end_of_the_epoch() -> None:
    pytest.importorskip("torchmetrics")
    first, second = run_ranks(metrics, 2, timeout=120.0)
    assert first["metric_epoch"] == second["metric_epoch"] == (10 + 300) / 16
    assert (first["metric_step"], second["metric_step"]) == (4.0, 40.0)
