"""A step clipped by norm, against `clip_grad_norm_` and a step, to the bit."""

from __future__ import annotations

import pytest
import torch

from lit_fast.optim import adopt
from lit_fast.optim.clip import step_clipped_by_norm


@pytest.mark.parametrize("limit", [0.1, 4.73, 1e4], ids=["clips", "near", "clips_nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_torch(limit: float, dtype: torch.dtype) -> None:
    """float64 has no kernel: torch clips in memory and the optimizer steps itself."""
    torch.manual_seed(5)
    weights = [torch.randn(7, 3), torch.randn(11)]
    gradients = [torch.randn(7, 3), torch.randn(11)]
    assert 4.72 < torch.nn.utils.get_total_norm(gradients) < 4.73
    after = []
    for ours in (True, False):
        parameters = [torch.nn.Parameter(weight.to(dtype)) for weight in weights]
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
        step = step_clipped_by_norm(adopt(optimizer), limit)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone().to(dtype)
            if ours:
                step()
            else:
                torch.nn.utils.clip_grad_norm_(parameters, limit)
                optimizer.step()
        after.append(parameters)
    for mine, theirs in zip(*after, strict=True):
        assert torch.equal(mine, theirs)


def test_no_gradient_is_no_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    step_clipped_by_norm(adopt(torch.optim.SGD([parameter], lr=0.5)), 1.0)()
    assert torch.equal(parameter, torch.ones(2))


def test_a_gradient_that_is_no_number_goes_through() -> None:
    """As in torch: the weights tell, nothing hides it."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    step_clipped_by_norm(adopt(torch.optim.SGD([parameter], lr=0.5)), 1.0)()
    assert parameter.isnan().all()
