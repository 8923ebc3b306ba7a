"""Prediction: what it returns and keeps, modes, data that is cut short, and batch indices for writers."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, rows, trainer
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import lit_fast
from lit_fast.data.combined import CombinedLoader
from lit_fast.errors import MisconfigurationException


class Predicts(Plain):
    def forward(self, batch: Any) -> Any:
        return self.net(batch)


class _Interval(Enum):
    BATCH, EPOCH = "batch", "epoch"
    on_batch = property(lambda self: self is _Interval.BATCH)
    on_epoch = property(lambda self: self is _Interval.EPOCH)


class BasePredictionWriter(lit_fast.Callback):
    """Stands in for the callback of that name, by which the loop knows it."""

    def __init__(self, interval: str) -> None:
        self.interval = _Interval(interval)
        self.indices: list[Any] = []

    def on_predict_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.interval.on_batch:
            self.indices.append(trainer.predict_loop.current_batch_indices)

    def on_predict_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.interval.on_epoch:
            self.indices = trainer.predict_loop.epoch_batch_indices
            self.predictions = trainer.predict_loop.predictions


def test_the_module_is_called_and_its_answers_come_back() -> None:
    model, data = Predicts(), batches(3)
    model.train()
    answers = trainer().predict(model, [data])
    assert answers is not None and len(answers) == 3 and model.training
    with torch.no_grad():
        assert all(torch.equal(a, model(batch)) for a, batch in zip(answers, data, strict=True))
    assert all(a.is_inference() for a in answers)
    made = trainer(inference_mode=False)
    assert not any(a.is_inference() or a.requires_grad for a in made.predict(model, [data]))  # type: ignore[union-attr]
    assert made.predict_loop.predictions is not None and made.num_predict_batches == [3]


def test_several_loaders_give_a_list_each_and_nothing_where_nothing_is_wanted() -> None:
    made = trainer(limit_predict_batches=2)

    class Tells(Plain):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch_idx, dataloader_idx

    assert made.predict(Tells(), [batches(3), batches(1)]) == [[(0, 0), (1, 0)], [(0, 1)]]
    assert made.predict(Tells(), [batches(3)], return_predictions=False) is None
    assert made.predict_loop.predictions == []
    assert trainer(limit_predict_batches=0).predict(Tells(), [batches(1)]) is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_writers_are_told_the_indices(interval: str, workers: int) -> None:
    loader = DataLoader(rows(7), batch_size=2, shuffle=True, num_workers=workers, drop_last=True)
    seen: list[Any] = []

    class Sees(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[0])
            return batch[0]

    writer = BasePredictionWriter(interval)
    answers = trainer(callbacks=[writer]).predict(Sees(), loader, return_predictions=False)
    assert answers is None
    indices = writer.indices[0] if interval == "epoch" else writer.indices
    data = loader.dataset.tensors[0]  # type: ignore[attr-defined]
    assert sorted(i for batch in indices for i in batch) == list(range(7)), "the last, smaller batch is not dropped"
    assert all(torch.equal(data[i], batch) for i, batch in zip(indices, seen, strict=True))
    if interval == "epoch":
        assert all(torch.equal(a, b) for a, b in zip(writer.predictions, seen, strict=True))
    assert loader.drop_last and type(loader.batch_sampler) is BatchSampler, "the user's loader is as it was"


def test_a_writer_and_data_without_indices() -> None:
    writer = BasePredictionWriter("batch")
    with pytest.warns(UserWarning, match="no batch indices"):
        trainer(callbacks=[writer]).predict(Predicts(), [batches(2)])
    assert writer.indices == [[], []]  # as in Lightning


def test_no_last_batch_is_left_out_of_a_loader_that_drops_it() -> None:
    answers = trainer().predict(Predicts2(), DataLoader(rows(5), batch_size=2, drop_last=True))
    assert answers is not None and [len(a) for a in answers] == [2, 2, 1]
    own = BatchSampler(SequentialSampler(rows(5)), 2, drop_last=True)  # type: ignore[arg-type]
    answers = trainer().predict(Predicts2(), DataLoader(rows(5), batch_sampler=own))
    assert answers is not None and [len(a) for a in answers] == [2, 2, 1] and own.drop_last


class Predicts2(Plain):
    def predict_step(self, batch: Any) -> Any:
        return self.net(batch[0])


def test_what_prediction_refuses() -> None:
    with pytest.raises(MisconfigurationException, match="neither predict_step"):
        trainer().predict(Plain(), [batches(1)])
    with pytest.raises(MisconfigurationException, match="needs a model"):
        trainer().predict()
    with pytest.raises(MisconfigurationException, match="No data to predict on"):
        trainer().predict(Predicts())
    with pytest.raises(MisconfigurationException, match="mode='sequential'"):
        trainer().predict(Predicts(), CombinedLoader([batches(1), batches(1)], "min_size"))

    class Logs(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.log("a", 1.0)

    with pytest.raises(MisconfigurationException, match="nothing can be logged"):
        trainer().predict(Logs(), [batches(1)])


def test_nothing_returned_is_said_once() -> None:
    class Silent(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            """Returns nothing."""

    with pytest.warns(UserWarning, match="returned None") as warned:
        assert trainer().predict(Silent(), [batches(3)]) == [None] * 3
    assert len(warned) == 1
