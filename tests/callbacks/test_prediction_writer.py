"""BasePredictionWriter: which hook writes what."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heart_models import trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_fast import LightningModule
from lit_fast.callbacks import BasePredictionWriter
from lit_fast.errors import MisconfigurationException


class Writer(BasePredictionWriter):
    def __init__(self, interval: Any = "batch") -> None:
        super().__init__(interval)
        self.calls: list[tuple[Any, ...]] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.calls.append(("batch", *args))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.calls.append(("epoch", *args))


@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_the_interval_says_who_is_called(interval: str) -> None:
    writer = Writer(interval)
    loop = SimpleNamespace(current_batch_indices=[4, 5], epoch_batch_indices=[[[4, 5]]], predictions=["p"])
    stand_in = SimpleNamespace(predict_loop=loop)
    writer.on_predict_batch_end(stand_in, None, "p", "b", 2, 1)
    writer.on_predict_epoch_end(stand_in, None)
    batch, epoch = ("batch", "p", [4, 5], "b", 2, 1), ("epoch", ["p"], [[[4, 5]]])
    assert writer.calls == {"batch": [batch], "epoch": [epoch], "batch_and_epoch": [batch, epoch]}[interval]
    live = {name for name in writer.live_hooks() if name.startswith("on_")}
    hooks = {"batch": "on_predict_batch_end", "epoch": "on_predict_epoch_end"}
    assert live == {hook for name, hook in hooks.items() if name in interval}


class Predicts(LightningModule):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[float]:
        return [float(value) for value in batch.flatten()]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(3.0).reshape(3, 1))


DATA = torch.arange(5.0).reshape(5, 1)
FIRST = [[0, 1], [2, 3], [4]], [[0.0, 1.0], [2.0, 3.0], [4.0]]  # indices and predictions
SECOND = [[4, 3], [2]], [[4.0, 3.0], [2.0]]


@pytest.mark.parametrize(
    ("loaders", "expected"),
    [
        (lambda: DataLoader(DATA, 2), [FIRST]),
        (lambda: DataLoader(DATA, 2, drop_last=True), [FIRST]),  # every sample is predicted
        (lambda: [DataLoader(DATA, 2), DataLoader(DATA, 2, sampler=[4, 3, 2])], [FIRST, SECOND]),
        (lambda: DataLoader(Stream(), 2), [([[], []], [[0.0, 1.0], [2.0]])]),
    ],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_what_a_prediction_hands_over(loaders: Any, expected: list[Any], wanted: bool) -> None:
    """The same calls as Lightning 2.6.6 makes."""
    writer = Writer("batch_and_epoch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Which samples a batch holds")
        returned = trainer(callbacks=[writer]).predict(Predicts(), loaders(), return_predictions=wanted)
    *batches, epoch = writer.calls
    assert [(prediction, indices, batch_idx, index) for _, prediction, indices, _, batch_idx, index in batches] == [
        (predictions[batch_idx], indices[batch_idx], batch_idx, index)
        for index, (indices, predictions) in enumerate(expected)
        for batch_idx in range(len(indices))
    ]
    predictions = [predictions for _, predictions in expected]
    predictions = predictions[0] if len(expected) == 1 else predictions
    assert epoch == ("epoch", predictions, [[i for i in indices if i] for indices, _ in expected])
    assert returned == (predictions if wanted else None)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'hour'"):
        Writer("hour")
    with pytest.raises(NotImplementedError, match="needs a method write_on_batch_end"):
        BasePredictionWriter().write_on_batch_end(None, None, None, None, None, 0, 0)
    module = SimpleNamespace(predict_step=lambda dataloader_iter: None)
    with pytest.raises(NotImplementedError, match="dataloader_iter"):
        Writer().setup(None, module, "predict")
