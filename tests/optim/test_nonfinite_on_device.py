"""Steps that a GPU leaves out, as the host sees them: a stand-in for the CUDA kernels does its work on the CPU.

What the kernels do is shown by tests/csrc/compare_cuda.cpp, and on a GPU by test_cuda_step.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_stand_in import Event, StandIn, no_waiting, stand_in_for_cuda
from torch import Tensor
from torch.nn import Parameter

from lit_fast.errors import MisconfigurationException, NonFiniteGradientError
from lit_fast.optim import adopt, nonfinite
from lit_fast.window import WindowWeights

MAKERS: dict[str, Any] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_cuda(monkeypatch)


def two_parameters() -> list[Parameter]:
    return [Parameter(torch.linspace(-1, 1, 300)), Parameter(torch.ones(4, 5))]


def set_gradients(parameters: list[Parameter], bad: float | None = None) -> None:
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    if bad is not None:
        parameters[1].grad[2, 3] = bad


def values(adopted: Any) -> list[Tensor]:
    return [p.detach().clone() for group in adopted.optimizer.param_groups for p in group["params"]]


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("limits", [{}, {"max_norm": 1.0}, {"clip_value": 0.25}], ids=["plain", "norm", "value"])
@pytest.mark.parametrize("kind", MAKERS)
def test_skipped_steps_are_counted_there(kind: str, limits: dict[str, float]) -> None:
    after = []
    for steps in ([float("nan"), None, float("inf"), None], [None, None]):
        parameters = two_parameters()
        adopted = adopt(MAKERS[kind](parameters), **limits, nonfinite="skip")
        assert adopted.compiled
        for bad in steps:
            set_gradients(parameters, bad)
            norm = adopted.step()
            assert (norm is not None) is ("max_norm" in limits)
            assert norm is None or norm.isfinite().item() is (bad is None)
        assert adopted.skipped_steps == len(steps) - 2
        after.append(values(adopted))
    assert_equal(*after)


@pytest.mark.usefixtures("cuda")
def test_an_error_comes_once_the_host_is_told_and_nothing_changes_till_then() -> None:
    parameters = two_parameters()
    adopted = adopt(MAKERS["adamw"](parameters), nonfinite="raise")
    set_gradients(parameters)
    adopted.step()
    before = values(adopted)
    for bad in (float("nan"), None, None):
        set_gradients(parameters, bad)
        adopted.step()
        assert_equal(before, values(adopted))
    Event.done = True
    with pytest.raises(NonFiniteGradientError, match=r"^A gradient was not finite.*in the last 3 steps"):
        adopted.step()
    set_gradients(parameters, float("inf"))
    with pytest.raises(NonFiniteGradientError, match=r"gradient of parameter 1 of param group 0.*the last 3 steps"):
        adopted.step()
    with pytest.raises(NonFiniteGradientError, match="in the last 3 steps"):
        adopted.guard.check(adopted.optimizer.param_groups)
    assert_equal(before, values(adopted))


@pytest.mark.usefixtures("cuda")
def test_no_error_without_cause() -> None:
    Event.done = True
    parameters = two_parameters()
    adopted = adopt(MAKERS["adamw"](parameters), nonfinite="raise")
    for _ in range(3):
        set_gradients(parameters)
        adopted.step()
    adopted.guard.check(adopted.optimizer.param_groups)
    assert adopted.skipped_steps == 0


@pytest.mark.usefixtures("cuda")
def test_whoever_must_know_on_the_host_waits() -> None:
    """torch's own steps, and step hooks, which do not run for a step that is left out."""
    seen: list[object] = []
    for make in (lambda ps: torch.optim.NAdam(ps, lr=0.1), MAKERS["adamw"]):
        parameters = two_parameters()
        optimizer = make(parameters)
        optimizer.register_step_pre_hook(lambda *_: seen.append(1))
        adopted = adopt(optimizer, nonfinite="skip")
        for bad in (float("inf"), None):
            set_gradients(parameters, bad)
            adopted.step()
        assert adopted.skipped_steps == 1
    assert len(seen) == 2


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_the_host_decides_on_the_step_that_begins_a_dampened_momentum(nonfinite: str) -> None:
    """It alone is not dampened."""
    ours, theirs = two_parameters(), two_parameters()
    optimizers = [torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5) for ps in (ours, theirs)]
    adopted = adopt(optimizers[0], nonfinite=nonfinite)
    if nonfinite == "skip":
        set_gradients(ours, float("inf"))
        adopted.step()
        assert not optimizers[0].state[ours[0]] and adopted.skipped_steps == 1
    for _ in range(3):
        for parameters in (ours, theirs):
            set_gradients(parameters)
        adopted.step()
        optimizers[1].step()
    assert adopted.compiled
    assert_equal([p.detach() for p in ours], [p.detach() for p in theirs])


def test_without_kernels_no_step_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "kernels_for", lambda device: ("", "this build has no CUDA kernels (no nvcc)"))
    with pytest.raises(MisconfigurationException, match=r"on cpu: no kernel can .* no CUDA kernels \(no nvcc\)"):
        adopt(torch.optim.SGD(two_parameters(), lr=0.1), nonfinite="skip")


# ---- what only the device knows ----


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("options", "hooked"),
    [
        *((options, False) for options in ({}, {"max_norm": 0.5}, {"nonfinite": "skip"})),
        ({"max_norm": 0.5, "norm_type": 1.0}, False),
        ({}, True),
    ],
)
def test_a_window_of_weights_there(options: dict[str, Any], hooked: bool) -> None:
    """The factor is a tensor, and the step is the one that a number gives."""
    stepped = []
    for on_device in (True, False):
        weights, parameters = WindowWeights(), two_parameters()
        for weight in (3.0, 1.0, 4.0):
            weights.add(torch.tensor(weight) if on_device else weight, length=3)
        assert isinstance(weights.factor(), Tensor) is on_device
        optimizer = MAKERS["momentum"](parameters)
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        set_gradients(parameters)
        weights.step(adopt(optimizer, **options).step)()
        stepped.append([p.detach() for p in parameters])
    for ours, expected in zip(*stepped, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("guard", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("limits", [{}, {"max_norm": 1.0}, {"clip_value": 1.0}], ids=["plain", "norm", "value"])
def test_nothing_on_the_way_waits_for_the_device(guard: str, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that do nothing: the stand-in reads tensors on the host."""
    monkeypatch.setattr(StandIn, "step_on_cuda", lambda self, groups, state, scale, *_: None if scale == 1.0 else "?")
    parameters = two_parameters()
    adopted = adopt(MAKERS["adamw"](parameters), **limits, nonfinite=guard)
    weights = WindowWeights()
    set_gradients(parameters)
    step = weights.step(adopted.step)

    no_waiting(monkeypatch)
    for _ in range(2):
        weights.begin()
        weights.add(torch.ones(()), length=2)
        weights.add(torch.ones(()), length=2)
        norm = step()
        assert adopted.compiled and isinstance(norm, Tensor) is ("max_norm" in limits)
