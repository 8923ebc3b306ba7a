"""Triton's kernels in its interpreter: the core's bits, and bounds against float64."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import adamw_step, assert_within, lion_step, sgd_step
from torch.nn import Parameter
from triton_interpreter import (
    CHUNK,
    CLIPPING,
    CPU,
    FAMILY,
    LAYOUTS,
    MAPPINGS,
    SIZES,
    assert_same_bits,
    fused,
    numbers,
    optimizer_of,
    set_gradients,
    table_of,
)

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim import adopt
from lit_fast.optim.lion import Lion
from lit_fast.optim.muon import Muon
from lit_fast.triton import adamw as adamw_kernel
from lit_fast.triton import launch
from lit_fast.triton import lion as lion_kernel


def test_fused_against_exact_arithmetic() -> None:
    generator = np.random.default_rng(0)
    x, y, z = (generator.standard_normal(2000).astype(np.float32) for _ in range(3))
    z[:1000] = -(x * y)[:1000]  # sums that cancel
    z[1000:1500] *= np.float32(2.0**26)
    for a, b, c, found in zip(x, y, z, fused(x, y, z), strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        near = [found, np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))]
        errors = [abs(Fraction(float(value)) - exact) for value in near]
        assert errors[0] <= min(errors[1:])


def assert_the_cores_bits(kind, options, layout, clipping, sizes, grad_scale, one_is_missing) -> None:
    """Over a first step and a later one."""
    ours, cores = (optimizer_of(kind, sizes, layout, **options) for _ in range(2))
    adopted = adopt(ours, **clipping)
    assert adopted.compiled and "by Triton, because a test says so" in adopted.reason
    mapping = MAPPINGS[kind]
    core = ops.core_stepper(mapping)
    limits = (clipping.get("max_norm", -1.0), clipping.get("clip_value", -1.0))
    for step in range(2):
        for optimizer in (ours, cores):
            set_gradients(optimizer, seed=step, missing=0 if one_is_missing and step == 0 else None)
        expected = core.step(cores.param_groups, cores.state, grad_scale, *limits)
        norm = adopted.step(grad_scale)
        assert adopted.compiled and (norm is None) == (expected is None)
        assert norm is None or norm.item() == expected
        width = 1 if kind in (torch.optim.SGD, Lion) else 32
        assert_same_bits(ours, cores, width)


@given(
    st.sampled_from(FAMILY),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(CLIPPING),
    st.lists(st.sampled_from(SIZES), min_size=1, max_size=2),
    st.sampled_from([1.0, 0.5, -3.0]),
    st.booleans(),
)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink an example takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_cores_bits_whatever_the_sizes_and_options(
    case, layout, clipping, sizes, grad_scale, one_is_missing
) -> None:
    kind, options = case
    assert_the_cores_bits(kind, options, layout, clipping, sizes, grad_scale, one_is_missing)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, "float32") for case in FAMILY),
        *((FAMILY[i], layout) for i in (1, 4, 6) for layout in list(LAYOUTS)[1:]),
    ],
)
def test_the_cores_bits_in_a_whole_block_and_a_part(case, layout) -> None:
    """With deterministic algorithms torch fills new memory with NaN, which no first step may read."""
    kind, options = case
    torch.use_deterministic_algorithms(True)
    try:
        assert_the_cores_bits(kind, options, layout, {}, (1100,), 1.0, False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_chunks_as_long_as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(launch, "Work", launch.Work.func)
    assert launch.CHUNK % 1024 == 0
    sizes = (launch.CHUNK - 1, launch.CHUNK + 1)
    ours = optimizer_of(torch.optim.SGD, sizes, lr=0.5)
    before = [p.detach().clone() for p in ours.param_groups[0]["params"]]
    set_gradients(ours, seed=1)
    adopt(ours).step()
    for p, b in zip(ours.param_groups[0]["params"], before, strict=True):
        assert torch.equal(p, b - 0.5 * p.grad)


@pytest.mark.parametrize("layout", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_within_the_derived_bound(layout, decoupled) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = optimizer_of(kind, (1003,), layout, **options)
    [param] = optimizer.param_groups[0]["params"]
    exp_avg, exp_avg_sq = (numbers(1003, param.dtype, s) for s in (5, 6))
    exp_avg_sq = exp_avg_sq.abs()
    optimizer.state[param] = {
        "step": torch.tensor(6.0),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    before = param.detach().clone()
    set_gradients(optimizer, seed=2)
    adopt(optimizer).step(grad_scale=0.3)
    expected = adamw_step(before, param.grad, exp_avg, exp_avg_sq, 7, decoupled=decoupled, grad_scale=0.3, **options)
    assert_within(param, expected["param"])
    for key in ("exp_avg", "exp_avg_sq"):
        assert_within(optimizer.state[param][key], expected[key])


@pytest.mark.parametrize("layout", ["float32", "bfloat16"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_within_the_derived_bound(layout, nesterov) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    optimizer = optimizer_of(torch.optim.SGD, (1003,), layout, **options)
    [param] = optimizer.param_groups[0]["params"]
    buffer = numbers(1003, param.dtype, 5)
    optimizer.state[param] = {"momentum_buffer": buffer.clone()}
    before = param.detach().clone()
    set_gradients(optimizer, seed=2)
    adopt(optimizer).step()
    expected = sgd_step(before, param.grad, buffer, **options)
    assert_within(param, expected["param"])
    assert_within(optimizer.state[param]["momentum_buffer"], expected["momentum_buffer"])


# ---- formulas that the core does not have, and counters on the device: tables written by hand ----


def run(formula: ModuleType, tensors, options, states, step=0.0, grad_scale=1.0) -> None:
    launch.Work(CPU, grad_scale, -1.0, -1.0, None, formula)(*table_of(tensors, options, states, step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_is_within_the_derived_bound(dtype, maximize) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    tensors = [
        {name: numbers(size, dtype, 10 * i + k) for k, name in enumerate(("param", "grad", "exp_avg"))}
        for i, size in enumerate((1003, CHUNK + 1))
    ]
    tensors[0]["grad"][:3], tensors[0]["exp_avg"][:3] = 0.0, 0.0
    before = [{name: value.clone() for name, value in t.items()} for t in tensors]
    run(lion_kernel, tensors, [1e-2, 0.9, 0.99, 0.1, float(maximize)], ("exp_avg",), grad_scale=0.5)
    for t, b in zip(tensors, before, strict=True):
        grad = -b["grad"] if maximize else b["grad"]
        expected = lion_step(b["param"], grad, b["exp_avg"], grad_scale=0.5, **options)
        assert_within(t["param"], expected["param"])
        assert_within(t["exp_avg"], expected["exp_avg"])
        assert torch.equal(t["grad"], b["grad"])


def test_counters_on_the_device_count_and_give_the_same_bits() -> None:
    names, options = ("exp_avg", "exp_avg_sq"), [0.1, 0.9, 0.999, 1e-8, 0.1, 1.0, 0.0]
    for step in (1, 2, 1000, 2**24 - 1):
        on_host, on_device = (
            [{n: numbers(33, torch.float32, k).abs() for k, n in enumerate(("param", "grad", *names))}]
            for _ in range(2)
        )
        on_device[0]["counter"] = torch.tensor(float(step - 1))
        run(adamw_kernel, on_host, options, names, step=float(step))
        run(adamw_kernel, on_device, options, names)
        assert on_device[0]["counter"].item() == step
        for name in ("param", *names):
            assert torch.equal(on_host[0][name], on_device[0][name])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_has_torchs_bits(nesterov) -> None:
    """Both passes, over two chunks, around torch's products; AdamW's group beside it, one matrix without a gradient."""
    shapes = ((40, 60), (5, 3), (4, 4), (64,))
    ours, theirs = ([Parameter(numbers(math.prod(s), torch.float32, 1).view(s)) for s in shapes] for _ in range(2))
    mine = Muon(ours, lr=0.1, nesterov=nesterov, momentum=0.6, ns_dtype="bfloat16", adamw_lr=0.1)
    muon = torch.optim.Muon(theirs[:3], lr=0.1, nesterov=nesterov, momentum=0.6)
    adamw = torch.optim.AdamW(theirs[3:], lr=0.1, fused=True)
    adopted = adopt(mine, max_norm=0.5)
    assert adopted.compiled and "muon on cpu by Triton" in adopted.reason
    for step in range(2):
        for params in (ours, theirs):
            for i, p in enumerate(params):
                p.grad = None if (step, i) == (0, 1) else numbers(p.numel(), p.dtype, 100 * step + i).view(p.shape)
        expected = ops.gradient_norm(muon.param_groups + adamw.param_groups)
        ops.scale_gradients_(muon.param_groups + adamw.param_groups, ops.clip_coefficient(expected, 0.5))
        muon.step()
        adamw.step()
        assert torch.equal(adopted.step(), expected)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    with pytest.raises(KernelError, match="only the core has a kernel"):
        Muon(ours[:2], state_dtype="8bit").step()
