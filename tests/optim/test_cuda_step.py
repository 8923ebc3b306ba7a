"""The compiled step on a GPU. The same kernels run without one in tests/csrc/test_targets_elsewhere.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from optimizer_cases import SHAPES, parameters, set_gradients, tensors_of
from oracle import adamw_step, assert_within
from torch import Tensor
from torch.nn import Parameter

import lit_fast as L
from lit_fast import ops, optim
from lit_fast.demos.boring_classes import BoringModel
from lit_fast.errors import KernelError, NonFiniteGradientError
from lit_fast.optim import adopt
from lit_fast.window import WindowWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

GPU = "cuda"
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
        if not p.numel():
            continue
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


# ---- gradients that are not finite ----

STORED: list[dict[str, Any]] = [
    {},
    {"state_dtype": "8bit"},
    {"state_dtype": "float32", "master": "float32"},
    {"state_dtype": "bfloat16", "master": "remainder", "rounding": "stochastic"},
]
GUARDED: dict[str, Any] = {
    "adamw": lambda ps, **stored: optim.AdamW(ps, lr=0.01, **stored),
    "momentum": lambda ps, **stored: optim.SGD(ps, lr=0.01, momentum=0.9, **stored),
    "lion": lambda ps, **stored: optim.Lion(ps, lr=0.01, **stored),
}


def gradients(params: list[Parameter], seed: int, bad: float | None = None) -> None:
    for p, source in zip(params, parameters([tuple(p.shape) for p in params], torch.float32, seed), strict=True):
        gradient = source.detach().to(GPU, p.dtype)
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
    if bad is not None:
        params[-1].grad.view(-1)[-1] = bad


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors_of(optimizer).items() if isinstance(value, Tensor)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@contextmanager
def nobody_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("limits", [{}, {"max_norm": 0.5}, {"clip_value": 0.1}], ids=["plain", "norm", "value"])
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("kind", GUARDED)
def test_a_run_with_skipped_steps_is_the_run_without(kind, stored, limits):
    after = []
    for steps in ([float("nan"), 0, 1, float("inf"), 2, float("-inf")], [0, 1, 2]):
        params = on_gpu(torch.bfloat16)
        adopted = adopt(GUARDED[kind](params, **stored), nonfinite="skip", **limits)
        assert adopted.compiled, adopted.reason
        gradients(params, seed=0)
        for number in steps:
            bad = None if math.isfinite(number) else number
            gradients(params, seed=100 if bad is not None else int(number), bad=bad)
            with nobody_waits():
                norm = adopted.step()
            assert (norm is not None) is ("max_norm" in limits)
            assert norm is None or bool(norm.isfinite()) is (bad is None)
        assert adopted.compiled and adopted.skipped_steps == len(steps) - 3
        after.append(everything(adopted.optimizer))
    assert_same(*after)


def test_counters_move_to_the_device_once():
    params = on_gpu()
    optimizer = torch.optim.AdamW(params, lr=0.01)
    adopt(optimizer).step()
    assert not optimizer.state[params[0]]["step"].is_cuda
    adopted = adopt(optimizer, nonfinite="skip")
    adopted.step()
    steps = [optimizer.state[p]["step"] for p in params]
    assert all(step.is_cuda and step.item() == 2.0 for step in steps)
    adopted.step()
    assert all(optimizer.state[p]["step"] is step and step.item() == 3.0 for p, step in zip(params, steps, strict=True))
    reference = torch.optim.AdamW([Parameter(p.detach().clone()) for p in params], lr=0.01)
    reference.load_state_dict(optimizer.state_dict())
    for p, q in zip(reference.param_groups[0]["params"], params, strict=True):
        p.grad = q.grad
    reference.step()


def test_an_error_comes_with_a_later_step_and_nothing_changes_till_then():
    params = on_gpu()
    adopted = adopt(torch.optim.AdamW(params, lr=0.01), nonfinite="raise")
    gradients(params, seed=0)
    adopted.step()
    before = everything(adopted.optimizer)
    gradients(params, seed=1, bad=float("nan"))
    with nobody_waits():
        adopted.step()
    gradients(params, seed=2)
    with pytest.raises(NonFiniteGradientError, match="which the device has left out"):
        for _ in range(2):  # the first of them may come before the count has arrived
            adopted.step()
            torch.cuda.synchronize()
    assert_same(everything(adopted.optimizer), before)
    with pytest.raises(NonFiniteGradientError):
        adopted.guard.check(adopted.optimizer.param_groups)


def capturable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["capturable"] = True
    return optimizer


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_captured_graph_skips_and_counts_too(stored):
    params = on_gpu(torch.bfloat16)
    optimizer = capturable(optim.AdamW(params, lr=0.01, **stored))
    adopted = adopt(optimizer, max_norm=1.0, nonfinite="skip")
    gradients(params, seed=0)
    adopted.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adopted.step()
    twins = [Parameter(p.detach().clone()) for p in params]
    twin = capturable(optim.AdamW(twins, lr=0.01, **stored))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = adopt(twin, max_norm=1.0)
    for seed, bad in ((1, None), (2, float("inf")), (3, None)):
        gradients(params, seed, bad)
        graph.replay()
        if bad is None:
            gradients(twins, seed)
            expected.step()
    assert adopted.skipped_steps == 1
    assert_same(everything(optimizer), everything(twin))


def test_sgd_is_captured_and_what_the_host_counts_is_not():
    params = on_gpu()
    adopted = adopt(torch.optim.SGD(params, lr=0.25, momentum=0.5))
    gradients(params, seed=0)
    adopted.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adopted.step()
    expected = [Parameter(p.detach().clone()) for p in params]
    twin = torch.optim.SGD(expected, lr=0.25, momentum=0.5)
    twin.load_state_dict(copy.deepcopy(adopted.optimizer.state_dict()))
    stepped = adopt(twin)
    for seed in (1, 2):
        gradients(params, seed)
        graph.replay()
        gradients(expected, seed)
        stepped.step()
    assert adopted.compiled
    assert_same(everything(adopted.optimizer), everything(twin))

    lion = optim.Lion(params, lr=0.01)  # counts on the host, and torch has no Lion
    lion.step()
    with (
        pytest.raises(KernelError, match="no step that a CUDA graph replays"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        lion.step()


# ---- what only the device knows ----


@pytest.mark.parametrize("limits", [{}, {"max_norm": 0.5}, {"max_norm": 0.5, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_of_weights_on_the_device(dtype, limits):
    """Its factor is a number that the host never sees: 3 * 4 / 8, which float32 holds."""
    stepped = []
    for on_device in (True, False):
        params, weights = on_gpu(dtype), WindowWeights()
        for weight in (4.0, 1.0, 3.0):
            weights.add(torch.tensor(weight, device=GPU) if on_device else weight, length=3)
        adopted = adopt(torch.optim.SGD(params, lr=0.5, momentum=0.9), **limits)
        with nobody_waits():
            weights.step(adopted.step)()
        assert adopted.compiled
        stepped.append(everything(adopted.optimizer))
    assert_same(*stepped)


def kernels_and_waits(function: Callable[[], Any]) -> tuple[list[str], int]:
    """The kernels that run on the device in one call, and how often the host waits for it."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        function()
    events = recorded.events()
    kernels = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    waits = sum(e.name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy") for e in events)
    return [name for name in kernels if not name.startswith(("Memcpy", "Memset", "Optimizer.step"))], waits


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("counters", ["host", "device"])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_step_is_three_kernels_and_no_wait(stored, counters, nonfinite):
    params = on_gpu(torch.bfloat16) * 20
    params = [Parameter(p.detach().clone()) for p in params]
    gradients(params, seed=0)
    optimizer = optim.AdamW(params, lr=0.01, **stored)
    adopted = adopt(optimizer if counters == "host" else capturable(optimizer), max_norm=1.0, nonfinite=nonfinite)
    kernels, waits = kernels_and_waits(adopted.step)
    assert adopted.compiled
    assert [sum(part in name for name in kernels) for part in ("square_kernel", "prepare_kernel")] == [1, 1], kernels
    assert len(kernels) == 3 and waits == 0, kernels


# ---- under the Trainer ----


class Poisoned(L.LightningModule):
    """Batch 2 of 5 has a gradient which is not finite; every batch says on the device what it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.seen: list[torch.dtype] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        loss = self.layers(batch).float().square().mean()
        if batch_idx == 2:
            loss = loss + self.layers[2].bias.float().sum() * float("inf")
        return {"loss": loss, "weight": torch.full((), 1.0 + batch_idx, device=batch.device)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=0.01, master="float32", state_dtype="float32")


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.1}], ids=["", "clipped"])
@pytest.mark.parametrize("window", [1, 2])
def test_the_trainer_skips_on_the_device(window, clipping):
    model, data = (
        Poisoned(),
        [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(5)],
    )
    wide = "float32" if hasattr(Tensor, "grad_dtype") else None
    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_epochs=1, precision="bf16-true", grad_dtype=wide, nonfinite="skip",
        accumulate_grad_batches=window, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **clipping,
    )  # fmt: skip
    trainer.fit(model, data)
    steps = -(-5 // window)
    assert trainer.skipped_steps == 1 and trainer.global_step == steps
    assert "compiled step (adamw on cuda" in trainer.explain()
    assert {int(entry["step"]) for entry in trainer.optimizers[0].state.values()} == {steps - 1}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_float16_with_a_scaler_clipping_and_a_fused_step():
    """What Lightning refuses."""
    model = BoringModel()
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_steps=12, precision="16-mixed", gradient_clip_val=0.5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model)
    assert trainer.global_step == 12 and "compiled step (adamw on cuda" in trainer.explain()
    for name, value in model.state_dict().items():
        assert not torch.equal(value.cpu(), before[name]) and value.isfinite().all()
