"""The manual's table of bytes per parameter, counted from the tensors of a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lit_fast.optim import SGD, AdamW, Lamb, Lion, Muon

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
SHAPE = (256, 100)
COLUMNS = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "remainder"), (torch.bfloat16, "float32")]


def counted(kind, state_dtype, dtype, master) -> float:
    param = Parameter(torch.ones(SHAPE, dtype=dtype))
    param.grad = torch.ones_like(param)
    more = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind([param], lr=1e-3, state_dtype=state_dtype, master=master, **more)
    optimizer.step()
    state = [t for name, t in optimizer.state[param].items() if isinstance(t, Tensor) and name != "step"]
    return sum(t.numel() * t.element_size() for t in (param, param.grad, *state)) / param.numel()


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        (AdamW, "AdamW"),
        (Lamb, "AdamW, LAMB"),
        (Lion, "Lion, SGD"),
        (SGD, "Lion, SGD"),
        (Muon, "Lion, SGD with momentum, Muon"),
    ],
)
def test_the_manual_counts_bytes_as_the_tensors_do(kind, title):
    table = PAGE[PAGE.index(f"| {title}") :].split("\n\n")[0]
    rows = re.findall(r"^\| (?:`state_dtype=)?`?(None|\"\w+\")`? \|(.*)\|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == ["None", '"float32"', '"bfloat16"', '"8bit"']
    for name, cells in rows:
        state_dtype = None if name == "None" else name.strip('"')
        expected = [counted(kind, state_dtype, *column) for column in COLUMNS]
        assert [float(cell) for cell in cells.split("|")] == [round(value, 2) for value in expected], name
