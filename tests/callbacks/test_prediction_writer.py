"""BasePredictionWriter: which hook writes what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
    trainer = SimpleNamespace(predict_loop=loop)
    writer.on_predict_batch_end(trainer, None, "p", "b", 2, 1)
    writer.on_predict_epoch_end(trainer, None)
    batch, epoch = ("batch", "p", [4, 5], "b", 2, 1), ("epoch", ["p"], [[[4, 5]]])
    assert writer.calls == {"batch": [batch], "epoch": [epoch], "batch_and_epoch": [batch, epoch]}[interval]
    live = {name for name in writer.live_hooks() if name.startswith("on_")}
    hooks = {"batch": "on_predict_batch_end", "epoch": "on_predict_epoch_end"}
    assert live == {hook for name, hook in hooks.items() if name in interval}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'hour'"):
        Writer("hour")
    with pytest.raises(NotImplementedError, match="needs a method write_on_batch_end"):
        BasePredictionWriter().write_on_batch_end(None, None, None, None, None, 0, 0)
    module = SimpleNamespace(predict_step=lambda dataloader_iter: None)
    with pytest.raises(NotImplementedError, match="dataloader_iter"):
        Writer().setup(None, module, "predict")
