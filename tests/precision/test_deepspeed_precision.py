"""`DeepSpeedPrecision` by itself; with the engine it is run in tests/strategies/test_deepspeed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.precision import DeepSpeedPrecision


@pytest.mark.parametrize(
    "name,dtype,made", [("bf16-mixed", torch.bfloat16, torch.float32), ("16-true", torch.float16, torch.float16)]
)
def test_inputs_are_cast_and_weights_where_it_is_true(name: str, dtype: torch.dtype, made: torch.dtype) -> None:
    precision = DeepSpeedPrecision(name)
    batch = precision.convert_input({"x": torch.ones(2), "index": torch.ones(2, dtype=torch.int64)})
    assert batch["x"].dtype == dtype and batch["index"].dtype == torch.int64
    assert precision.convert_module(torch.nn.Linear(2, 1)).weight.dtype == made
    with precision.module_init_context():
        assert torch.nn.Linear(2, 1).weight.dtype == made


def test_the_loss_scale_is_state_where_it_moves() -> None:
    precision = DeepSpeedPrecision("16-true")
    assert precision.state_dict() == {}
    precision.loss_scaler = SimpleNamespace(cur_scale=8.0, cur_iter=3, dynamic=True, dtype=torch.float16)
    state = precision.state_dict()
    assert state == {"cur_scale": 8.0, "cur_iter": 3, "dynamic": True}
    precision.load_state_dict({**state, "cur_scale": 4.0})
    assert precision.loss_scaler.cur_scale == 4.0
    precision.loss_scaler.dynamic = False
    assert precision.state_dict() == {}


def test_other_names_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="allowed are '32-true', '16-mixed'"):
        DeepSpeedPrecision("64-true")
