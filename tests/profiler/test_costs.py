"""Bytes and FLOPs of operations against counts by hand, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_fast.profiler import costs as costs_room
from lit_fast.profiler.costs import Costs
from lit_fast.profiler.throughput import measure_flops


def test_streams_are_counted_once_in_and_once_out() -> None:
    a, b, out = torch.ones(100), torch.ones(1).expand(100), torch.empty(100, dtype=torch.float64)
    table, rows = torch.ones(1000, 8), torch.tensor([1, 2, 3])
    with Costs() as costs:
        a + b
        a.mul_(2.0)
        out.copy_(a)
        a.view(10, 10).t()
        torch.empty(5)
        nn.functional.embedding(rows, table)
        a.zero_()
    assert {name: [cost.bytes for cost in made] for name, made in costs.calls.items()} == {
        "aten::add": [400 + 4 + 400],  # the expanded one lies in memory once
        "aten::mul_": [400 + 400],
        "aten::copy_": [400 + 800],
        "aten::embedding": [2 * 3 * 8 * 4 + 3 * 8],
        "aten::zero_": [400],
    }


def test_flops_are_those_of_torch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(2, 3, 8, 8)
    with Costs() as costs:
        model(x).sum().backward()
    counted = measure_flops(model, lambda: model(x), lambda output: output.sum())
    assert costs.model_flops == costs.hardware_flops == counted
    assert costs.calls["aten::addmm"][0].flops == 2 * 2 * 4 * 36 * 5
    with torch.inference_mode(), Costs() as costs:  # where operations arrive whole
        model(x)
    assert costs.model_flops == measure_flops(model, lambda: model(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_repeats_is_hardware_alone(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 8, requires_grad=True)
    with Costs() as plain:
        model(x).sum().backward()
    with Costs() as repeated:
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    assert plain.model_flops == plain.hardware_flops == repeated.model_flops == 3 * forward
    assert plain.hardware_flops < repeated.hardware_flops <= 4 * forward  # the last product need not be repeated


def test_attention_on_the_cpu_is_counted_too() -> None:
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    with Costs() as costs:
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert costs.hardware_flops == (2 + 5) * product and costs.model_flops == pytest.approx((2 + 4) * product)


def test_what_cannot_be_counted_does_not_stop_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise TypeError("a tensor of another kind")

    monkeypatch.setattr(costs_room, "_bytes", refuse)
    with Costs() as costs:
        assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]
    assert costs.uncounted["aten::add"] == "TypeError: a tensor of another kind" and costs.calls == {}
