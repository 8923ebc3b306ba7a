"""Triton's kernels in its interpreter: norm, scale and clipping; steps that are left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter
from triton.runtime.interpreter import InterpretedFunction
from triton_interpreter import (
    CHUNK,
    CPU,
    FAMILY,
    assert_same_bits,
    numbers,
    optimizer_of,
    set_gradients,
)

from lit_fast import ops
from lit_fast.optim import adamw, adopt, scaling
from lit_fast.optim.adamw import AdamW
from lit_fast.optim.muon import Muon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_against_float64(dtype) -> None:
    optimizer = optimizer_of(torch.optim.SGD, (0, 1, 5000, CHUNK), lr=0.1)
    params = optimizer.param_groups[0]["params"]
    for scale in (1.0, 1e-25, 1e25):
        for i, p in enumerate(params):
            p.data = p.data.to(dtype)
            p.grad = (numbers(p.numel(), torch.float32, i) * scale).to(dtype)
        exact = 0.5 * torch.cat([p.grad.double() for p in params]).norm().item()
        norm = ops.gradient_norm(optimizer.param_groups, -0.5)
        assert norm.shape == () and norm.dtype == torch.float32
        assert abs(norm.item() / exact - 1.0) <= 2.0**-24 * 1.001


@pytest.mark.parametrize("limits", [{}, {"max_norm": 0.5}, {"clip_value": 0.1}])
def test_a_scale_that_is_a_tensor_gives_the_bits_of_a_number(limits) -> None:
    results = []
    for scale in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        optimizer = optimizer_of(torch.optim.AdamW, (CHUNK + 3, 5), lr=0.1)
        set_gradients(optimizer, seed=1)
        adopted = adopt(optimizer, **limits)
        norm = adopted.step(grad_scale=scale)
        assert adopted.compiled
        results.append(
            [
                *(p.detach() for p in optimizer.param_groups[0]["params"]),
                *([norm] if limits == {"max_norm": 0.5} else []),
            ]
        )
    for by_number, by_tensor in zip(*results, strict=True):
        assert torch.equal(by_number, by_tensor)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_norm_is_finite_only_if_every_gradient_is(bad) -> None:
    optimizer = optimizer_of(torch.optim.SGD, (CHUNK, 3), lr=0.1)
    set_gradients(optimizer, seed=1)
    optimizer.param_groups[0]["params"][0].grad[CHUNK - 1] = bad
    assert not ops.gradient_norm(optimizer.param_groups).isfinite()


@pytest.mark.parametrize(
    ("case", "limits"),
    [(FAMILY[0], {}), (FAMILY[0], {"max_norm": 0.5}), (FAMILY[5], {"clip_value": 0.4}), (FAMILY[6], {"max_norm": 0.5})],
    ids=["AdamW", "AdamW-norm", "SGD-value", "Lion-norm"],
)
def test_steps_that_are_left_out_change_nothing_and_are_counted(case, limits) -> None:
    """As if they had not been: counters, momentum buffers that begin with zeros instead of the gradient included."""
    kind, options = case
    sizes = (CHUNK + 3, 0, 5)
    skipping, without = (optimizer_of(kind, sizes, **options) for _ in range(2))
    adopted, plain = adopt(skipping, **limits, nonfinite="skip"), adopt(without, **limits)
    assert adopted.compiled and "by Triton, because a test says so" in adopted.reason
    for step, bad in enumerate((math.nan, None, math.inf, None, -math.inf)):
        set_gradients(skipping, seed=step)
        set_gradients(without, seed=step)
        if bad is not None:
            skipping.param_groups[0]["params"][0 if step else 2].grad[CHUNK if step else 0] = bad
        norm = adopted.step(0.5)
        expected = plain.step(0.5) if bad is None else None
        assert (norm is not None) is ("max_norm" in limits)
        assert expected is None or torch.equal(norm, expected)
        assert norm is None or norm.isfinite().item() is (bad is None)
        if bad is None:
            assert_same_bits(skipping, without, 1)
    assert adopted.skipped_steps == 3
    assert_same_bits(skipping, without, 1)
    if kind is not torch.optim.SGD:
        assert all(state["step"].item() == 2.0 for state in skipping.state.values() if "step" in state)


@pytest.mark.parametrize("factor", [0.5, math.nan, math.inf])
def test_a_factor_that_only_the_device_knows_decides_too(factor) -> None:
    """A loss scale that is not finite, or a window of weights that sum to zero."""
    optimizer = optimizer_of(torch.optim.SGD, (CHUNK + 3,), lr=0.1)
    [param] = optimizer.param_groups[0]["params"]
    before = param.detach().clone()
    set_gradients(optimizer, seed=1)
    adopted = adopt(optimizer, nonfinite="skip")
    adopted.step(grad_scale=torch.tensor(factor))
    assert adopted.skipped_steps == (0 if math.isfinite(factor) else 1)
    assert torch.equal(param, before) is not math.isfinite(factor)


def test_gradients_whose_norm_no_float32_holds_are_finite() -> None:
    optimizer = optimizer_of(torch.optim.SGD, (9,), lr=1.0)
    [param] = optimizer.param_groups[0]["params"]
    param.grad, before = torch.full((9,), 3e38), param.detach().clone()
    adopted = adopt(optimizer, nonfinite="skip")
    adopted.step()
    assert adopted.skipped_steps == 0 and torch.equal(param, before - 3e38)


def test_after_a_bad_step_none_is_taken_for_good() -> None:
    optimizer = optimizer_of(torch.optim.AdamW, (CHUNK + 3, 7), lr=0.1)
    params = optimizer.param_groups[0]["params"]
    skipped = torch.zeros((), dtype=torch.int64)
    stepper = ops.Stepper(adamw.MAPPING, CPU)
    step = stepper.skipping(skipped, for_good=True)
    for seed, bad in enumerate((False, True, False, False)):
        set_gradients(optimizer, seed)
        if bad:
            params[1].grad[6] = math.inf
        assert step(optimizer.param_groups, optimizer.state, 1.0, -1.0, -1.0) is None
        if seed == 0:
            after = [p.detach().clone() for p in params]
    assert skipped.item() == 3 and all(map(torch.equal, params, after))
    assert all(state["step"].item() == 1.0 for state in optimizer.state.values())


@pytest.mark.parametrize("limits", [{}, {"max_norm": 0.5}], ids=str)
def test_a_scaler_is_told_by_the_step_that_unscales(limits, monkeypatch) -> None:
    """Under `adopt(scaler=...)`; the same bits as of gradients that nobody has scaled, by a power of two."""
    monkeypatch.setattr(scaling, "kernels_for", lambda device: ("Triton", "a test says so"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    ours, twin = (optimizer_of(torch.optim.AdamW, (CHUNK + 3, 5), lr=0.1) for _ in range(2))
    adopted, plain = adopt(ours, **limits, scaler=scaler), adopt(twin, **limits)
    assert adopted.compiled and adopted.loss_scale.in_registers
    for step, bad in enumerate((False, True, False)):
        for optimizer in (ours, twin):
            set_gradients(optimizer, seed=step)
        for p in ours.param_groups[0]["params"]:
            p.grad *= scaler.get_scale()
        if bad:
            ours.param_groups[0]["params"][1].grad[4] = math.inf
        adopted.step()
        scaler.update()
        if not bad:
            plain.step()
        assert scaler.get_scale() == (1024.0 if step == 0 else 512.0)
    assert_same_bits(ours, twin, 1)


@pytest.mark.parametrize("bad", [False, True])
def test_an_optimizer_of_ours_is_left_out_by_what_the_scaler_has_found(bad, monkeypatch) -> None:
    """`scaler.step(optimizer)` tells the step; no gradient is read for it."""
    launched: list[str] = []
    run_kernel = InterpretedFunction.run

    def counting(self, *args, **kwargs):
        launched.append(self.__name__)
        return run_kernel(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counting)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    ours, twin = (optimizer_of(AdamW, (CHUNK + 3, 5), lr=0.1) for _ in range(2))
    for optimizer in (ours, twin):
        set_gradients(optimizer, seed=1)
    params = ours.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad *= 1024.0
    params[1].grad[0] *= math.inf if bad else 1.0
    scaler.step(ours)
    assert launched == ["prepare_kernel", "step_kernel"]
    if bad:
        assert all(map(torch.equal, params, before))
    else:
        twin.step()
        assert_same_bits(ours, twin, 1)


def test_muon_and_what_has_no_kernel_are_left_out_by_the_host() -> None:
    params = [Parameter(numbers(12, torch.float32, 1).view(3, 4)), Parameter(numbers(5, torch.float32, 2))]
    before = [p.detach().clone() for p in params]
    for optimizer in (Muon(params, lr=0.1), torch.optim.Adagrad(params, lr=0.1)):
        adopted = adopt(optimizer, nonfinite="skip")
        assert adopted.compiled is isinstance(optimizer, Muon)
        for bad in (True, False):
            for p in params:
                p.grad = torch.full_like(p, math.nan if bad else 1.0)
            adopted.step()
            assert all(map(torch.equal, params, before)) is bad
        before = [p.detach().clone() for p in params]
        assert adopted.skipped_steps == 1
    dampened = adopt(torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5), nonfinite="skip")
    assert dampened.compiled  # its first step is one of which the host must know
    for bad in (True, False):
        for p in params:
            p.grad = torch.full_like(p, math.nan if bad else 1.0)
        dampened.step()
        assert all(map(torch.equal, params, before)) is bad
    assert dampened.skipped_steps == 1


def test_no_gradients_have_the_norm_zero() -> None:
    optimizer = optimizer_of(torch.optim.SGD, (4, 0), lr=0.1)
    assert ops.gradient_norm(optimizer.param_groups).item() == 0.0
    assert adopt(optimizer, max_norm=1.0).step().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [(0.5, -1.0), (-1.0, 0.4), (-1.0, -1.0), (1e6, -1.0)])
def test_gradients_are_rewritten_as_the_core_does(dtype, limits) -> None:
    params = [Parameter(torch.zeros(n, dtype=dtype)) for n in (5, CHUNK + 1)]
    results = []
    for kernels in ("CPU", "Triton"):
        ops.kernels_for = lambda device, kernels=kernels: (kernels, "")
        for i, p in enumerate(params):
            p.grad = numbers(p.numel(), dtype, i)
        versions = [p.grad._version for p in params]
        norm = ops.clip_gradients_([{"params": params}], 0.3, *limits)
        assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))
        results.append((norm, [p.grad for p in params]))
    (core_norm, core), (norm, ours) = results
    assert (norm is None) == (limits[0] < 0.0) and (norm is None or torch.equal(norm, core_norm))
    assert all(torch.equal(a, b) for a, b in zip(ours, core, strict=True))


def test_addresses_that_are_no_multiple_of_16_give_the_same_bits() -> None:
    results = []
    for shift in (0, 1):
        p = Parameter(torch.zeros(CHUNK + 9)[shift:][: CHUNK + 1])
        p.data.copy_(numbers(CHUNK + 1, torch.float32, 0))
        p.grad = numbers(CHUNK + 1, torch.float32, 1)
        norm = adopt(torch.optim.AdamW([p], lr=0.1), max_norm=0.5).step()
        results.append((p.detach(), norm))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
