"""Memory by category: counted by hand on the CPU; CUDA's allocator is replaced by figures, no GPU being there."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from lit_fast.profiler import memory as room
from lit_fast.profiler.memory import StepMemory

CPU = torch.device("cpu")


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(50, 400, bias=False), nn.Linear(400, 10, bias=False)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden.sigmoid()  # the line that saves most
        return self.second(hidden)


def test_every_storage_is_counted_once() -> None:
    model = TwoLayers()
    optimizer = torch.optim.AdamW(model.parameters())
    parameters, batch = 4 * (50 * 400 + 400 * 10), 4 * 64 * 50
    hidden, scale = 4 * 64 * 400, 4 * 5
    x = torch.randn(64, 50)
    with StepMemory(model, [optimizer], CPU) as step:
        step.sample("start")
        loss = model(x).sum()
        step.sample("forward")
        loss.backward()
        step.sample("backward")
        optimizer.step()
        step.sample("optimizer")
    del loss
    gc.collect()
    start, forward, backward, optimized = step.memory().over_step
    assert [s.parameters for s in (start, forward, backward, optimized)] == [parameters] * 4
    assert [s.other for s in (start, optimized)] == [scale] * 2
    # What sigmoid returned it saves itself, and the second product saves it again; the first saves its input.
    assert (start.activations, forward.activations, backward.activations) == (0, hidden + batch, 0)
    assert (start.gradients, forward.gradients, backward.gradients, optimized.gradients) == (0, 0, *[parameters] * 2)
    assert backward.optimizer == 0 and optimized.optimizer == 2 * parameters + 2 * 4  # and two step counters
    memory = step.memory()
    assert memory.peak == 4 * parameters + 2 * 4 + scale and memory.host_resident and memory.host_resident > 50e6
    assert memory.peak_owner == "optimizer (50% after optimizer)"
    assert step.live == 0 and step.most == hidden + batch


def test_the_line_that_saves_most_is_named() -> None:
    model = TwoLayers()
    with StepMemory(model, [], CPU) as step:
        loss = model(torch.randn(2000, 50)).sum()
        step.sample("forward")
    owner = step.memory().peak_owner
    assert owner is not None and owner.startswith("activations (") and loss.requires_grad
    assert "test_memory.py" in owner and "hidden = hidden.sigmoid()" in owner and "(3.2 MB)" in owner


def test_gradients_are_the_same_with_and_without() -> None:
    torch.manual_seed(0)
    model, x = TwoLayers(), torch.randn(8, 50)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with StepMemory(model, [], CPU):
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), plain, strict=True))


def test_cuda_asks_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoLayers()
    stats = {"allocated_bytes.all.peak": 900_000, "reserved_bytes.all.current": 1_000_000, "num_alloc_retries": 3}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500_000)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(
        room.StepMemory, "_sum", lambda self, tensors, seen: 4 * sum(1 for t in tensors if t is not None)
    )
    with StepMemory(model, [], torch.device("cuda")) as step:
        step.sample("forward")
    memory = step.memory()
    assert memory.over_step[0].activations == 500_000 - 4 * 2 - 4
    assert (memory.peak, memory.reserved, memory.allocator_retries) == (900_000, 1_000_000, 3)


def test_functions_that_torch_transforms_run_as_without() -> None:
    weight, x = torch.randn(3, requires_grad=True), torch.randn(4, 3)
    disable = torch.autograd.graph.disable_saved_tensors_hooks

    def of_each(w: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return (w * row).square().sum()

    expected = torch.func.vmap(torch.func.grad(of_each), in_dims=(None, 0))(weight.detach(), x)
    with StepMemory(torch.nn.Linear(1, 1), [], torch.device("cpu")) as step:
        found = torch.func.vmap(torch.func.grad(of_each), in_dims=(None, 0))(weight.detach(), x)
        with pytest.raises(ZeroDivisionError):
            torch.func.vmap(lambda _: 1 / 0)(x)
        loss = (weight.exp() * x).sum()
        held = step.live
        loss.backward()
    assert torch.equal(found, expected) and held > 0 and weight.grad is not None
    assert torch.autograd.graph.disable_saved_tensors_hooks is disable
