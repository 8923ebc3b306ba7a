"""What is LAMB's own: norms over whole tensors, and what must not change their bits. test_compiled.py has its steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_within, lamb_step
from storage_cases import storages
from torch import Tensor
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.errors import KernelError, MisconfigurationException
from lit_fast.optim import AdamW, Lamb, adopt

SIZES = (1, 7, 256, 257, 16_384, 40_003)  # up to three chunks of a thread's work


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(7)
    made = [Parameter(torch.randn(n, generator=generator).to(dtype)) for n in SIZES]
    return [*made, Parameter(torch.zeros(5, dtype=dtype)), Parameter(torch.zeros(0, dtype=dtype))]


def set_gradients(ps: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def trained(options: dict[str, Any], dtype: torch.dtype = torch.float32, steps: int = 2, **clip: Any) -> list[Tensor]:
    ps = parameters(dtype)
    optimizer = Lamb(ps, lr=0.05, **options)
    adopted = adopt(optimizer, **clip)
    for step in range(steps):
        set_gradients(ps, step)
        adopted.step()
    assert adopted.compiled, adopted.reason
    states = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [p.detach() for p in ps] + states


@pytest.mark.parametrize("options", [{}, {"trust_clip": True}, {"weight_decay": 0.0, "always_adapt": False}])
def test_norms_of_tensors_of_any_size_against_float64(options: dict[str, Any]) -> None:
    ps = parameters()
    optimizer = Lamb(ps, lr=0.05, **options)
    group = optimizer.param_groups[0]
    numbers = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "trust_clip", "always_adapt")}
    for step in range(1, 4):
        set_gradients(ps, step)
        before = []
        for p in ps:
            entry = optimizer.state.get(p, {})
            moments = (entry.get(name, torch.zeros_like(p)).clone() for name in ("exp_avg", "exp_avg_sq"))
            before.append((p.detach().clone(), p.grad, *moments))
        optimizer.step()
        for p, old in zip(ps, before, strict=True):
            if p.numel():
                assert_within(p, lamb_step(*old, step, **numbers)["param"])
            assert optimizer.state[p]["step"] == step


def test_a_ratio_of_one_is_adams_update() -> None:
    """Without decay and ratio what is left is Adam's step, but for the order of its operations."""
    ours, theirs = parameters(), parameters()
    first = Lamb(ours, lr=0.01, weight_decay=0.0, always_adapt=False)
    second = AdamW(theirs, lr=0.01, weight_decay=0.0, eps=1e-6)
    for step in range(3):
        for ps, optimizer in ((ours, first), (theirs, second)):
            set_gradients(ps, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_for_any_threads_and_target(dtype: torch.dtype) -> None:
    threads, target = torch.get_num_threads(), ops.build_info()["cpu_target"]
    for storage in storages(Lamb, dtype):
        expected = trained(storage, dtype)
        for name in ops.build_info()["cpu_targets_supported"]:
            try:
                ops.use_cpu_target(name)
                torch.set_num_threads(2 if name == "scalar" else 3)
                assert all(map(torch.equal, expected, trained(storage, dtype))), (name, storage)
            finally:
                torch.set_num_threads(threads)
                ops.use_cpu_target(target)


def test_norms_are_those_of_a_clipped_gradient() -> None:
    clipped = trained({}, steps=1, max_norm=1.0)
    ps = parameters()
    set_gradients(ps, 0)
    torch.nn.utils.clip_grad_norm_(ps, 1.0)
    Lamb(ps, lr=0.05).step()
    for ours, theirs in zip(clipped, ps, strict=False):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_no_number_is_seen() -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.tensor([0.0, math.nan, 0.0])
    Lamb([p]).step()
    assert p.isnan().tolist() == [False, True, False]  # the norm is none, and the ratio 1


def test_triton_has_no_kernel_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Lamb([p])
    monkeypatch.setattr(ops, "kernels_for", lambda device: ("Triton", "a test says so"))
    assert adopt(optimizer).reason == "Lamb: its own step, because there is no Triton kernel for lamb"
    with pytest.raises(KernelError, match=r"lit_fast\.optim\.Lamb cannot step: there is no Triton kernel for lamb"):
        Lamb([p]).step()
    assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": math.nan}, {"betas": (1.0, 0.9)}])
def test_options_that_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(bad))):
        Lamb(parameters(), **bad)


# ---- on a GPU; test_cuda_storage.py has every storage, tests/csrc/compare_cuda.cpp the same kernels without one ----

LONG = (1, 300, 32_768, 32_769, 3_000_000)  # up to 92 blocks of threads, in many orders of arrival


def on_gpu(seed: int, sizes: tuple[int, ...] = LONG) -> list[Parameter]:
    if not ops.build_info()["cuda"]:
        pytest.skip(f"this build has no CUDA kernels: {ops.build_info()['cuda_reason']}")
    generator = torch.Generator().manual_seed(seed)
    made = [Parameter(torch.randn(n, generator=generator).cuda()) for n in sizes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).cuda()
    return made


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class TestOnGpu:
    pytestmark = on_a_gpu

    def test_the_same_bits_each_time_whichever_block_comes_last(self) -> None:
        first: list[Tensor] | None = None
        for _ in range(30):
            params = on_gpu(1)
            optimizer = Lamb(params, lr=0.05)
            for _ in range(3):
                optimizer.step()
            found = [p.detach() for p in params]
            first = found if first is None else first
            assert all(map(torch.equal, first, found))

    def test_norms_of_long_tensors_against_float64(self) -> None:
        params = on_gpu(2)
        before = [p.detach().cpu() for p in params]
        optimizer = Lamb(params, lr=0.05)
        optimizer.step()
        for p, b in zip(params, before, strict=True):
            zeros = torch.zeros_like(b)
            numbers = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
            expected = lamb_step(b, p.grad.cpu(), zeros, zeros, 1, trust_clip=False, always_adapt=True, **numbers)
            assert_within(p.detach().cpu(), expected["param"])

    def test_nobody_waits_and_a_captured_graph_replays_the_step(self) -> None:
        params, twins = on_gpu(3), on_gpu(3)
        captured = adopt(Lamb(params, lr=0.05, capturable=True), max_norm=1.0, nonfinite="skip")
        eager = adopt(Lamb(twins, lr=0.05, capturable=True), max_norm=1.0, nonfinite="skip")
        captured.step()
        eager.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                graph.replay()
                eager.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(map(torch.equal, params, twins))
        for p in params:
            p.grad[0] = torch.inf
        before = [p.detach().clone() for p in params]
        graph.replay()
        assert captured.skipped_steps == 1 and all(map(torch.equal, params, before))
