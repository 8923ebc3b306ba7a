"""The Triton kernels on CPU tensors, in Triton's interpreter: test_triton.py runs this file in a process of its own.

Chunks are shorter here than on a GPU, but for one test: the interpreter takes 20 ms a block.
"""

from __future__ import annotations

import functools
import math
import struct
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import adamw_step, assert_within, lion_step, sgd_step
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from lit_fast import ops
from lit_fast.errors import KernelError
from lit_fast.optim import adamw, adopt, lion, scaling, sgd
from lit_fast.optim.adamw import AdamW
from lit_fast.optim.lion import Lion
from lit_fast.optim.muon import Muon
from lit_fast.triton import adamw as adamw_kernel
from lit_fast.triton import launch
from lit_fast.triton import lion as lion_kernel

CPU = torch.device("cpu")
CHUNK = 2048
ROW_WORDS = 10
MAPPINGS = {
    AdamW: adamw.MAPPING,
    torch.optim.AdamW: adamw.MAPPING,
    torch.optim.Adam: adamw.MAPPING,
    torch.optim.SGD: sgd.MAPPING,
    Lion: lion.MAPPING,
}
SIZES = (0, 1, 17, CHUNK - 1, CHUNK, CHUNK + 1)
FAMILY = [
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "betas": (0.3, 0.9), "maximize": True}),
    (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Lion, {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.1, "maximize": True}),
]
LAYOUTS = {  # parameter and gradient, state
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 state": (torch.float32, torch.bfloat16),
}
CLIPPING = [{}, {"max_norm": 0.5}, {"max_norm": 1e6}, {"clip_value": 0.4}]


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float32 with one rounding. A float64 holds the product; the sum is rounded to odd before the last
    rounding, which then is the only one that counts (Boldo & Melquiond 2008, "Emulation of FMA"). In float64 the
    kernels multiply what float32 held, exactly, but for one scalar that they round to float32 next."""
    if x.dtype != np.float32:
        return x * y + z
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (rest != 0.0) & (bits % 2 == 0)
    odd = np.where(inexact, np.where((rest > 0.0) == (total > 0.0), bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


@pytest.fixture(autouse=True)
def fma_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on every GPU. The interpreter of Triton 3.7 rounds the product too."""

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


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


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "kernels_for", lambda device: ("Triton", "a test says so"))
    monkeypatch.setattr(launch, "Work", functools.partial(launch.Work, chunk=CHUNK))


def numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def optimizer_of(kind, sizes, layout="float32", seed=0, **options) -> torch.optim.Optimizer:
    """With states as after a few steps where the layout's differ from the parameter's, and none otherwise."""
    dtype, state_dtype = LAYOUTS[layout]
    params = [Parameter(numbers(n, dtype, seed + i)) for i, n in enumerate(sizes)]
    optimizer = kind(params, **options)
    if state_dtype != dtype:
        for i, p in enumerate(params):
            state = {key: numbers(p.numel(), state_dtype, i + 7).abs() for key in MAPPINGS[kind].state_keys}
            optimizer.state[p] = state if kind is torch.optim.SGD else {**state, "step": torch.tensor(3.0)}
    return optimizer


def set_gradients(optimizer: torch.optim.Optimizer, seed: int, missing: int | None = None) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = None if i == missing else numbers(p.numel(), p.dtype, 100 * seed + i)


def assert_same_bits(ours: torch.optim.Optimizer, cores: torch.optim.Optimizer, width: int) -> None:
    """But for the elements behind torch's last full vector, which its CPU kernel, and so the core's, rounds otherwise.

    Those are one rounding of `exp_avg_sq` apart; that they are right, the tests against float64 say.
    """
    for a, b in zip(ours.param_groups[0]["params"], cores.param_groups[0]["params"], strict=True):
        body = slice(0, a.numel() - a.numel() % width)
        assert torch.equal(a.detach()[body], b.detach()[body])
        assert ours.state.get(a, {}).keys() == cores.state.get(b, {}).keys()
        for key, value in ours.state.get(a, {}).items():
            expected = cores.state[b][key]
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected) if key == "step" else torch.equal(value[body], expected[body])


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


def table_of(tensors: list[dict[str, Tensor]], options: list[float], states: tuple[str, ...], step=0.0):
    """As csrc/hand_over.cpp writes it, for tensors of one layout and one set of options."""
    rows, chunks = [], 0
    for t in tensors:
        param, counter = t["param"], t.get("counter")
        half = int(param.dtype == torch.bfloat16)
        row = [param.data_ptr(), t["grad"].data_ptr(), 0 if counter is None else counter.data_ptr(), param.numel()]
        row += [chunks, half, 0, 0, *(t[name].data_ptr() for name in states)]
        rows += row + [0] * (ROW_WORDS - len(row))
        chunks += -(-param.numel() // CHUNK)
    floats = [step, 0.0, *options]
    words = bytearray(struct.pack(f"{len(rows)}q{len(floats)}d", *rows, *floats))
    return words, ROW_WORDS, len(floats), len(tensors), chunks, False


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


# ---- norm, scale and clip ----


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


# ---- what a step costs, and what it refuses ----


def mixed_groups() -> torch.optim.Optimizer:
    """Tensors of both dtypes, with momentum and without."""
    params = [Parameter(torch.ones(2, dtype=d)) for _ in range(3) for d in (torch.float32, torch.bfloat16)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": params[:2], "momentum": 0.9}, {"params": params[2:4]}, {"params": params[4:], "lr": 0.3}]
    return torch.optim.SGD(groups, lr=0.1)


def test_a_step_takes_two_launches_and_three_with_a_norm(monkeypatch) -> None:
    launched: list[str] = []
    run_kernel = InterpretedFunction.run

    def counting(self, *args, **kwargs):
        launched.append(self.__name__)
        return run_kernel(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counting)
    adopted = adopt(mixed_groups())
    adopted.step()
    assert launched == ["prepare_kernel", "step_kernel"]
    launched.clear()
    adopted.set_clipping(max_norm=1.0)
    adopted.step()
    assert launched == ["square_kernel", "prepare_kernel", "step_kernel"]
    launched.clear()
    adopted.clip_gradients()
    assert launched == ["square_kernel", "prepare_kernel", "scale_kernel"]
    assert adopted.compiled


def test_nothing_on_the_way_waits_for_the_device(monkeypatch) -> None:
    """With launches that do nothing: the interpreter itself reads tensors on the host."""
    optimizer = mixed_groups()
    adopted = adopt(optimizer, max_norm=1.0)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: None)

    def waits(*args, **kwargs):
        raise AssertionError("the host would wait for the device")

    for name in "item cpu tolist numpy nonzero __bool__ __float__ __int__ __index__ equal".split():
        monkeypatch.setattr(torch.Tensor, name, waits)
    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    norm = adopted.step(grad_scale=0.5)
    assert adopted.compiled and isinstance(norm, Tensor)
    adopted.clip_gradients()
    ops.gradient_norm(optimizer.param_groups)


def test_the_table_goes_to_the_device_by_one_copy_that_is_not_waited_for(monkeypatch) -> None:
    copies: list[tuple[bool, torch.device]] = []
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        copies.append((non_blocking and any(tensor is p for p in pinned), device))
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    elsewhere = torch.device("meta")
    tensor = {name: torch.zeros(3) for name in ("param", "grad", "exp_avg")}
    work = launch.Work(elsewhere, 1.0, -1.0, -1.0, None, lion_kernel)
    work(*table_of([tensor], [0.1, 0.9, 0.99, 0.0, 0.0], ("exp_avg",)))
    assert copies == [(True, elsewhere)]


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


def test_written_tensors_get_a_new_version_and_gradients_do_not() -> None:
    optimizer = optimizer_of(torch.optim.AdamW, (3,), lr=0.1)
    [param] = optimizer.param_groups[0]["params"]
    adopted = adopt(optimizer)
    set_gradients(optimizer, seed=0)
    adopted.step()
    tensors = [param, *optimizer.state[param].values()]
    versions, of_grad = [t._version for t in tensors], param.grad._version
    adopted.step()
    assert [t._version for t in tensors] == [v + 1 for v in versions] and param.grad._version == of_grad


def test_what_is_refused_is_refused_before_anything_is_written() -> None:
    shared = torch.ones(8)
    params = [Parameter(shared[:5]), Parameter(shared[4:])]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    stepper = ops.Stepper(sgd.MAPPING, CPU)
    refusal = stepper.step(optimizer.param_groups, optimizer.state, 1.0, 1.0, -1.0)
    assert refusal == "parameters 0 and 1 of the optimizer, gradients or states share memory"
    assert torch.equal(shared, torch.ones(8)) and not optimizer.state
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(KernelError, match="clip_gradients_"):
        ops.clip_gradients_(optimizer.param_groups, 0.5)


@pytest.mark.parametrize(
    ("dtype", "options", "known"),
    [
        (torch.float32, {}, True),
        (torch.float32, {"state_dtype": "bfloat16"}, True),
        (torch.float32, {"state_dtype": "bfloat16", "rounding": "stochastic"}, False),
        (torch.float32, {"state_dtype": "8bit"}, False),
        (torch.float32, {"amsgrad": True}, False),
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {"state_dtype": "bfloat16"}, True),
        (torch.bfloat16, {"state_dtype": "float32"}, False),
        (torch.bfloat16, {"state_dtype": "8bit"}, False),
        (torch.bfloat16, {"rounding": "stochastic"}, False),
        (torch.bfloat16, {"master": "float32", "state_dtype": "float32"}, False),
        (torch.bfloat16, {"master": "remainder"}, False),
        (torch.float16, {}, False),
    ],
    ids=str,
)
def test_storage_that_the_kernels_do_not_know_is_refused(dtype, options, known) -> None:
    """Before the first step, so that nobody is told of a kernel that there is not, and by the step itself: what only
    the core can step must not be stepped as if it were plain."""
    param = Parameter(torch.ones(300, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param], lr=0.5, **options)
    stepper = ops.Stepper(adamw.MAPPING, CPU)
    early = stepper.refusal(optimizer.param_groups)
    late = stepper.step(optimizer.param_groups, optimizer.state, 1.0, -1.0, -1.0)
    assert (not early) is (late is None) is known is not torch.equal(param, torch.ones_like(param))
    if known:
        return
    assert all(why.startswith("only the core has a kernel for its dtypes or options") for why in (early, late))
    adopted = adopt(AdamW([param], lr=0.5, **options))
    assert not adopted.compiled and "its own step, because only the core" in adopted.reason
    if "amsgrad" not in options and options:
        with pytest.raises(KernelError, match="only the core has a kernel"):
            adopted.step()
        with pytest.raises(KernelError, match="only the core has a kernel"):
            adopt(torch.optim.AdamW([param]), **options)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
def test_float32_gradients_of_16_bit_parameters_are_refused_before_the_first_step() -> None:
    param = Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    param.grad = torch.ones(3)
    optimizer = torch.optim.SGD([param], lr=0.5)
    assert "of their parameters' own dtype alone" in adopt(optimizer).reason
    assert "only the core" in ops.Stepper(sgd.MAPPING, CPU).step(optimizer.param_groups, {}, 1.0, -1.0, -1.0)


def test_a_formula_without_a_kernel_is_refused_by_the_step_too(monkeypatch) -> None:
    monkeypatch.setattr(ops.triton, "formula_named", lambda name, options: (None, f"there is no kernel for {name}"))
    optimizer = optimizer_of(torch.optim.SGD, (3,), lr=0.1)
    set_gradients(optimizer, seed=0)
    stepper = ops.Stepper(sgd.MAPPING, CPU)
    assert stepper.refusal(optimizer.param_groups) == "there is no kernel for sgd"
    assert stepper.step(optimizer.param_groups, optimizer.state, 1.0, -1.0, -1.0) == "there is no kernel for sgd"


def test_a_launch_that_fails_leaves_the_optimizer_as_it_was(monkeypatch) -> None:
    optimizer = optimizer_of(torch.optim.AdamW, (3,), lr=0.1)
    set_gradients(optimizer, seed=0)
    adopted = adopt(optimizer)

    def fails(self, *args, **kwargs):
        raise RuntimeError("no such device")

    monkeypatch.setattr(InterpretedFunction, "run", fails)
    with pytest.raises(RuntimeError, match="no such device"):
        adopted.step()
    assert not optimizer.state
    monkeypatch.undo()
