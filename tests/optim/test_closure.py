"""Which optimizers have to be called with their closure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_fast.optim import SGD, AdamW, Lion, adopt
from lit_fast.optim.closure import calls_closure_itself, plain_step


class Own(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Renamed(torch.optim.SGD):
    """Changes nothing about the step."""


@pytest.mark.parametrize(
    "kind,itself",
    [(torch.optim.SGD, False), (torch.optim.RMSprop, False), (Renamed, False), (Own, True), (torch.optim.LBFGS, True)],
)
def test_who_calls(kind: Any, itself: bool) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert calls_closure_itself(optimizer) is itself
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the step
    assert calls_closure_itself(optimizer) is itself


@pytest.mark.parametrize("kind", [torch.optim.SGD, Own])
def test_order_within_a_step(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    adopted, order = adopt(kind([parameter], lr=0.5)), []

    def closure() -> str:
        assert torch.is_grad_enabled()
        order.append("closure")
        parameter.grad = torch.ones(1)
        return "loss"

    def after() -> None:
        order.append("after")
        assert parameter.item() == 1.0

    step = plain_step(adopted, adopted.step, after)
    assert step(closure) == "loss"
    assert order == ["closure", "after"] and parameter.item() == 0.5


def test_the_loop_evaluates_the_loss_for_our_own_optimizers() -> None:
    weight = [torch.nn.Parameter(torch.ones(2))]
    assert not calls_closure_itself(AdamW(weight))
    assert not calls_closure_itself(Lion(weight)) and not calls_closure_itself(SGD(weight))
