"""Every optimizer in every storage on a GPU: within the oracle's bounds, and the CPU's bits.

The same kernels run without a GPU in tests/csrc/compare_cuda.cpp.
"""

from __future__ import annotations

import random
from typing import Any

import oracle
import pytest
import torch
from many_cases import Cases, check, many, optimizer_over, ways
from storage_cases import DTYPES, KINDS, Case, current_moments, make_case, optimizer_of, storages
from torch import Tensor
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.optim import Muon, adopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

GPU = "cuda"
GRADS = [(dtype, dtype) for dtype in DTYPES]
if hasattr(Tensor, "grad_dtype"):
    GRADS += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.fixture(autouse=True)
def built() -> None:
    if not ops.build_info()["cuda"]:
        pytest.skip(f"this build has no CUDA kernels: {ops.build_info()['cuda_reason']}")


# ---- the oracle ----


def to_gpu(cases: Cases, counters: str) -> None:
    """Move the tensors that a step works on; what is compared stays."""
    _, dtype, grad_dtype, _ = cases.way
    for name, value in cases.flat.items():
        if isinstance(value, Tensor):
            cases.flat[name] = value.to(counters if name == "step" else GPU)
    cases.params = [Parameter(cases.flat["param"][r.start : r.stop]) for r in cases.ranges]
    for p, r in zip(cases.params, cases.ranges, strict=True):
        if grad_dtype != dtype:
            p.grad_dtype = grad_dtype
        p.grad = cases.flat["grad"][r.start : r.stop]


@pytest.mark.parametrize("counters", ["cpu", GPU], ids=["steps on the host", "steps on the device"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_within_the_derived_bound(kind: Any, dtype: torch.dtype, counters: str) -> None:
    """Lengths around a pack's and a block's, cases between guards, as on the CPU (test_compiled.py)."""
    for way in ways(kind):
        if way[1] != dtype:
            continue
        parts = many(way, 20, counters)
        bounds = [part.bounds() for part in parts]
        for part in parts:
            to_gpu(part, counters)
        optimizer = optimizer_over(parts)
        for part in parts:
            part.enter(optimizer)
        optimizer.step()
        assert not optimizer._refusal, "torch's own step ran"
        for part, expected in zip(parts, bounds, strict=True):
            stored = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in part.leave(optimizer).items()}
            check(part, stored, expected, {}, f"{way}, {counters}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_muon_is_within_the_derived_bound(dtype: torch.dtype) -> None:
    """With products in float32, which torch computes in float32 unless it is told otherwise."""
    draw = random.Random(f"muon {dtype}")
    for storage in storages(Muon, dtype):
        made: dict[str, Any] = {
            "lr": 10 ** draw.uniform(-4, -1),
            "weight_decay": draw.choice([0.0, 0.1]),
            "momentum": draw.choice([0.0, 0.6, 0.95]),
            "nesterov": draw.random() < 0.5,
            "ns_steps": draw.randrange(6 if dtype == torch.float32 else 2),
            "ns_coefficients": (3.4445, -4.7750, 2.0315),
            "eps": 1e-7,
        }
        value, buffer = torch.randn(20, 30).to(dtype).float(), torch.zeros(20, 30)
        param = Parameter(value.to(dtype).to(GPU))
        param.grad = torch.randn(20, 30).to(dtype).to(GPU)
        optimizer = Muon([param], ns_dtype="float32", **made, **storage)
        stochastic = storage["rounding"] == "stochastic"
        bounds = oracle.muon_step(value, param.grad.cpu(), buffer, dtype=dtype, stochastic=stochastic, **made)
        optimizer.step()
        assert not optimizer._refusal, "torch's own step ran"
        entry = optimizer.state[param]
        found = entry["master"] if "master" in entry else param.detach()
        bound = bounds["param"] if "master" in entry else bounds["param"].stored(dtype, stochastic)
        oracle.assert_within(found.cpu(), bound)


# ---- the CPU ----


def same(a: Tensor, b: Tensor) -> bool:
    """A NaN is one: bfloat16 makes the variance of a centered RMSprop negative now and then."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def on_gpu(case: Case) -> Case:
    """The same case there; its counter of steps stays on the host, where both then make the same coefficients."""
    param = Parameter(case.param.detach().to(GPU, copy=True))
    if case.param.grad.dtype != param.dtype:
        param.grad_dtype = case.param.grad.dtype
    param.grad = case.param.grad.to(GPU)
    entry = {
        name: value.clone().to("cpu" if name == "step" else GPU) if isinstance(value, Tensor) else value
        for name, value in case.entry.items()
    }
    return Case(case.made, {**case.group, "params": [param]}, param, case.grad, case.before, {}, entry, case.step)


@pytest.mark.parametrize(("dtype", "grad_dtype"), GRADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_the_cpus(kind: Any, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Parameters, states, codes, scales, masters, remainders, random bits. 32 divides numel: torch's tail on the CPU
    is another formula. One case is longer than a block of threads takes."""
    draw = random.Random(f"bits {kind.__name__} {dtype} {grad_dtype}")
    torch.manual_seed(4)
    here = [make_case(kind, dtype, way, draw, numel=n) for way in storages(kind, dtype) for n in (608, 40_000)]
    if grad_dtype != dtype:
        for case in here:
            gradient, case.param.grad = case.param.grad.to(grad_dtype), None
            case.param.grad_dtype = grad_dtype
            case.param.grad = gradient + torch.randn_like(gradient) * 2.0**-12  # what 16 bits do not hold
    there = [on_gpu(case) for case in here]
    for cases in (here, there):
        optimizer = optimizer_of(kind, cases)
        for _ in range(3):
            optimizer.step()
        assert not optimizer._refusal, "torch's own step ran"
        for case in cases:
            case.entry = optimizer.state.get(case.param, {})
    for ours, theirs in zip(there, here, strict=True):
        assert same(ours.param.cpu(), theirs.param), ours.group
        assert ours.entry.keys() == theirs.entry.keys()
        for name, value in theirs.entry.items():
            found = ours.entry[name]
            equal = same(found.cpu(), value) if isinstance(value, Tensor) else found == value
            assert equal, (name, ours.group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storages_beside_each_other_in_one_step(dtype: torch.dtype) -> None:
    """One launch a kind of storage, each with its own part of one table: the bits of a step alone."""
    draw = random.Random(f"beside {dtype}")
    kind = KINDS[0]
    cases = [make_case(kind, dtype, way, draw, numel=n) for way in storages(kind, dtype) for n in (256, 608, 32)]
    alone, beside = [on_gpu(case) for case in cases], [on_gpu(case) for case in cases]
    first = 0
    for case in alone:  # their random bits are those of their place among all
        before = Parameter(torch.zeros(first, dtype=dtype, device=GPU))
        optimizer = kind([{**case.group, "params": [before, case.param]}])
        optimizer.state[case.param] = case.entry
        optimizer.step()
        first += -(-case.param.numel() // 256) * 256
    optimizer_of(kind, beside).step()
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.param, other.param), one.group
        names = kind.mapping.state_keys[: 3 if one.made["amsgrad"] else 2]
        values = [current_moments(case.entry, names) for case in (one, other)]
        assert all(torch.equal(values[0][name], values[1][name]) for name in names), one.group


def test_float32_gradients_are_summed_clipped_and_stepped() -> None:
    """The norm of a float32 gradient, a factor that the device alone knows, and the clip coefficient, in one step."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    param = Parameter(torch.randn(3000, device=GPU).bfloat16())
    param.grad_dtype = torch.float32
    param.grad = torch.randn(3000, device=GPU)
    before = param.detach().double()
    optimizer = torch.optim.SGD([param], lr=1.0)
    adopted = adopt(optimizer, max_norm=0.5, state_dtype="float32", master="float32")
    norm = adopted.step(grad_scale=torch.tensor(0.25, device=GPU))
    exact = 0.25 * param.grad.double()
    assert adopted.compiled and abs(norm.item() / exact.norm().item() - 1.0) <= 1e-6
    expected = before - exact * (0.5 / (exact.norm() + 1e-6))
    # Roundings of the norm, its sum with 1e-6, the quotient, the products with factor and gradient, the difference.
    bound = 6 * 2.0**-24 * (before.abs() + exact.abs())
    assert ((optimizer.state[param]["master"].double() - expected).abs() <= bound).all()
