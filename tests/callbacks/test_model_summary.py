"""The table at the start of a fit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from callback_standins import StandInTrainer
from torch import nn

from lit_fast.callbacks import ModelSummary, RichModelSummary
from lit_fast.callbacks.model_summary import count, summarize


def model() -> nn.Module:
    result = nn.Sequential()
    result.add_module("body", nn.Sequential(nn.Linear(10, 100), nn.BatchNorm1d(100)))
    result.add_module("head", nn.Linear(100, 3))
    result.body[0].weight.requires_grad = False
    result.head.eval()
    return result


def test_counts() -> None:
    summary = summarize(model())
    assert [(layer.name, layer.type, layer.parameters) for layer in summary.layers] == [
        ("body", "Sequential", 1300),
        ("head", "Linear", 303),
    ]
    assert (summary.total_parameters, summary.trainable_parameters) == (1603, 603)
    assert summary.model_size == pytest.approx(1603 * 4 / 1e6)
    assert summary.total_training_modes == {"train": 3, "eval": 1}
    assert [layer.name for layer in summarize(model(), -1).layers] == ["body", "body.0", "body.1", "head"]


def test_shared_and_lazy_parameters() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    tied["b"].weight = tied["a"].weight
    assert summarize(tied).total_parameters == 16
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1).to(torch.bfloat16))
    summary = summarize(lazy)
    assert summary.lazy and summary.layers[0].lazy and summary.total_parameters == 4
    assert summary.model_size == pytest.approx(8 / 1e6)
    assert summary.columns()[3] == ("Params", ["0?", "4"])


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (1234, "1.2 K"), (124_439_808, "124 M"), (7 * 10**12, "7.0 T")],
)
def test_short_counts(number: int, text: str) -> None:
    assert count(number) == text


def test_shown_as_text_or_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = StandInTrainer(tmp_path)
    with caplog.at_level(logging.INFO):
        ModelSummary().on_fit_start(trainer, model())
    RichModelSummary().on_fit_start(trainer, model())
    for text in (caplog.text, capsys.readouterr().out):
        assert "body" in text and "Sequential" in text and "1.3 K" in text and "1.6 K" in text
        assert "Trainable params" in text and "603" in text
    caplog.clear()
    ModelSummary(max_depth=0).on_fit_start(trainer, model())
    ModelSummary().on_fit_start(StandInTrainer(tmp_path, is_global_zero=False), model())
    assert caplog.text == ""


def test_a_summary_prints_as_a_table() -> None:
    lines = str(summarize(nn.Sequential(nn.Linear(2, 3)))).splitlines()
    assert [line.split() for line in lines[0:3:2]] == [
        ["|", "Name", "|", "Type", "|", "Params", "|", "Mode"],
        ["0", "|", "0", "|", "Linear", "|", "9", "|", "train"],
    ]
    assert "9         Total params" in lines
