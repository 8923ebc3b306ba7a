"""The compiled step on a GPU. The same kernels run without one in tests/csrc/test_targets_elsewhere.py."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import SHAPES, parameters, set_gradients
from oracle import adamw_step, assert_within
from torch.nn import Parameter

from lit_fast import ops
from lit_fast.optim import adopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SHAPES_AND_CHUNKS = (*SHAPES, (40_000,), (70_001,))


def on_gpu(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    params = [Parameter(p.detach().cuda()) for p in parameters(SHAPES_AND_CHUNKS, dtype)]
    for p, host in zip(params, parameters(SHAPES_AND_CHUNKS, dtype, seed=9), strict=True):
        p.grad = host.detach().cuda()
    return params


@pytest.fixture(autouse=True)
def built() -> None:
    if not ops.build_info()["cuda"]:
        pytest.skip(f"this build has no CUDA kernels: {ops.build_info()['cuda_reason']}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_gpu_and_cpu_give_the_same_bits_where_torch_has_no_remainder(kind, dtype):
    """Elements before torch's CPU remainder are computed in one order on both."""
    options = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    sizes = [(1024,), (64, 33), (32 * 2049,)]
    results = []
    for device in ("cpu", "cuda"):
        params = [Parameter(p.detach().to(device)) for p in parameters(sizes, dtype)]
        adopted = adopt(kind(params, **options))
        assert adopted.compiled, adopted.reason
        for step in range(5):
            for p, source in zip(params, parameters(sizes, dtype, seed=step), strict=True):
                p.grad = source.detach().to(device)
            adopted.step()
        results.append([p.detach().cpu() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fused", [True, None])
def test_one_step_is_within_the_derived_bound(fused):
    params = on_gpu()
    before = [p.detach().cpu() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=fused)
    adopted = adopt(optimizer)
    adopted.step()
    assert adopted.compiled, adopted.reason
    for p, b in zip(params, before, strict=True):
        assert optimizer.state[p]["step"].item() == 1.0
        assert optimizer.state[p]["step"].is_cuda == bool(fused)
        zeros = torch.zeros_like(b)
        expected = adamw_step(
            b, p.grad.cpu(), zeros, zeros, 1, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, decoupled=True
        )
        assert_within(p.cpu(), expected["param"])
        assert_within(optimizer.state[p]["exp_avg_sq"].cpu(), expected["exp_avg_sq"])


@pytest.mark.parametrize("capturable", [False, True])
def test_no_step_waits_for_the_device(capturable):
    params = on_gpu()
    adopted = adopt(torch.optim.AdamW(params, capturable=capturable), max_norm=1.0)
    adopted.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = adopted.step(grad_scale=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.is_cuda and norm.shape == () and norm.dtype == torch.float32
    exact = 0.5 * torch.cat([p.grad.double().flatten() for p in params]).norm().item()
    assert abs(norm.item() / exact - 1.0) <= 1e-7


def test_clipping_agrees_with_torch():
    ours, theirs = on_gpu(), on_gpu()
    adopt(torch.optim.SGD(ours, lr=1.0), max_norm=0.5).step()
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.optim.SGD(theirs, lr=1.0).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_misaligned_tensors_are_stepped():
    flat = torch.randn(4097, device="cuda")
    param = Parameter(flat[1:])
    param.grad = torch.randn(4100, device="cuda")[3:4099]
    before = param.detach().clone()
    adopted = adopt(torch.optim.SGD([param], lr=0.5))
    adopted.step()
    assert adopted.compiled
    assert torch.equal(param, torch.addcmul(before, param.grad, torch.full_like(before, -0.5)))


def test_the_current_stream_is_used():
    params = on_gpu()
    adopted = adopt(torch.optim.SGD(params, lr=0.5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = [p.detach().clone() for p in params]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms: a step on another stream would be done long before
        for p in params:
            p.grad = torch.full_like(p, 2.0)
        adopted.step()
    stream.synchronize()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p, b - 1.0)


def test_a_captured_graph_replays_the_step():
    params = on_gpu()
    adopted = adopt(torch.optim.AdamW(params, capturable=True))
    adopted.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adopted.step()
    steps = adopted.optimizer.state[params[0]]["step"]
    before = steps.item()
    graph.replay()
    graph.replay()
    assert steps.item() == before + 2.0


def test_parameters_that_moved_to_the_gpu_after_adoption():
    params = parameters(SHAPES, torch.float32)
    set_gradients(params, seed=0)
    adopted = adopt(torch.optim.SGD(params, lr=0.1))
    adopted.step()
    for p in params:
        p.data, p.grad = p.data.cuda(), None
        p.grad = torch.ones_like(p)
    adopted.step()
    assert adopted.compiled and "cuda" in adopted.reason
