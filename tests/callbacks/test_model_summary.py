"""The table at the start of a fit; its numbers are compared with Lightning's in callback_programs.model_summaries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_programs import Names, make_module, make_trainer
from torch import nn

import lit_fast
from lit_fast.callbacks import ModelSummary, RichModelSummary
from lit_fast.model_summary import LayerSummary, parse_batch_shape, summarize

NAMES = Names("lit_fast.pytorch")


def fit(tmp_path: Path, callback: Any, module: Any = None, **options: Any) -> Any:
    module = make_module(NAMES) if module is None else module
    quiet = {"enable_model_summary": True, "max_epochs": 1, "num_sanity_val_steps": 0, **options}
    make_trainer(NAMES, str(tmp_path), callbacks=callback, **quiet).fit(module)
    return module


def test_shown_as_text_or_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lit_fast.callbacks.model_summary")
    with caplog.at_level(logging.INFO, logger=logger.name):
        logger.addHandler(caplog.handler)
        fit(tmp_path, ModelSummary(max_depth=2))
        fit(tmp_path, ModelSummary(max_depth=0))
        logger.removeHandler(caplog.handler)
    fit(tmp_path, RichModelSummary(max_depth=2, header_style="red"))
    said = [record.getMessage() for record in caplog.records if record.name == logger.name]
    for text in (said[0], capsys.readouterr().out):
        assert "backbone.1" in text and "BatchNorm1d" in text and "FLOPs" in text and "Trainable params" in text
        assert "54" in text and "73" in text  # the first layer, and the model
    assert not any("Trainable params" in text for text in said[2:])


def test_a_subclass_shows_it_elsewhere(tmp_path: Path) -> None:
    shown: list[Any] = []

    class Keep(ModelSummary):
        @staticmethod
        def summarize(summary_data: Any, *totals: Any, total_flops: int, **options: Any) -> None:
            shown.append((dict(summary_data)["Name"], totals, total_flops, options))

    fit(tmp_path, Keep(max_depth=1, ruled=True))
    assert shown == [
        (["backbone", "head"], (73, 73, pytest.approx(73 * 4e-6), {"train": 6, "eval": 0}), 0, {"ruled": True})
    ]


def test_the_example_goes_through_the_transfer_hooks_and_leaves_modes_alone(tmp_path: Path) -> None:
    class Doubling(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.example_input_array = torch.zeros(5, 2)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return torch.cat([batch, batch], dim=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return self.layer(x)

    module = Doubling()
    summary = summarize(module)
    assert (summary.in_sizes, summary.out_sizes, summary.total_flops) == ([[5, 4]], [[5, 3]], 2 * 5 * 4 * 3)
    assert module.training and not module.layer._forward_hooks
    assert str(summary).count("\n") == 10 and "[5, 4]" in str(summary)


def test_parameters_without_a_shape_and_of_other_types() -> None:
    class Lazy(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lazy, self.half = nn.LazyLinear(3), nn.Linear(3, 1).bfloat16()

    with pytest.warns(UserWarning, match="first forward"):
        summary = summarize(Lazy())
    assert (summary.total_parameters, summary.param_nums, summary.model_size) == (4, [0, 4], pytest.approx(8e-6))


def test_one_layer() -> None:
    layer = nn.LSTM(2, 3)
    summary = LayerSummary(layer)
    assert (summary.in_size, summary.out_size) == ("?", "?")
    layer(torch.ones(4, 1, 2))
    assert summary.in_size == [4, 1, 2]
    assert summary.out_size == [[4, 1, 3], [[1, 1, 3], [1, 1, 3]]]
    assert parse_batch_shape({"a": 1}) == "?"
    with pytest.raises(ValueError, match="max_depth=-2"):
        summarize(make_module(NAMES), max_depth=-2)
