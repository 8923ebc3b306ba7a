"""Steps under a loss scale on a GPU: the device decides, and nobody waits. What the host does: test_scaling.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import lit_fast
import lit_fast.optim as ours
from lit_fast import ops
from lit_fast.optim import adopt
from lit_fast.optim.scaling import LossScale
from lit_fast.precision import MixedPrecision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

INF, NAN = float("inf"), float("nan")
STEPS = [None, INF, None, None, None, NAN, None, -INF, None, None, None, None]
SHAPES = ((300,), (64, 33), (), (40_000,))

PAIRS: dict[str, tuple[Any, Any]] = {
    "adamw": (lambda ps: torch.optim.AdamW(ps, lr=0.1), lambda ps: ours.AdamW(ps, lr=0.1)),
    "momentum": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), lambda ps: ours.SGD(ps, lr=0.1, momentum=0.9)),
    "dampened": (
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
        lambda ps: ours.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    ),
}


@pytest.fixture(autouse=True)
def built() -> None:
    if not ops.build_info()["cuda"]:
        pytest.skip(f"this build has no CUDA kernels: {ops.build_info()['cuda_reason']}")


def scaler() -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cuda", init_scale=2.0**16, growth_interval=3)
    made.scale(torch.zeros((), device="cuda"))
    return made


def parameters(seed: int = 1) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).cuda()) for shape in SHAPES]


def set_gradients(params: list[Parameter], step: int, scale: float, bad: float | None = None) -> None:
    for p, values in zip(params, parameters(100 + step), strict=True):
        p.grad = values.detach() * scale
    if bad is not None:
        params[1].grad[2, 3] = bad  # type: ignore[index]


@contextmanager
def no_waiting(unless: bool = False) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if unless else "error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loop(make: Any, take: Callable[[Any, Any], Callable[[], Any]], may_wait: Callable[[int], bool]) -> Any:
    params, own = parameters(), scaler()
    optimizer = make(params)
    step, states = take(own, optimizer), []
    for number, bad in enumerate(STEPS):
        set_gradients(params, number, own.get_scale(), bad)
        with no_waiting(may_wait(number)):
            step()
            own.update()
        states.append(own.state_dict())
    return [p.detach() for p in params], states


def of_torch(own: Any, optimizer: Any) -> Callable[[], Any]:
    return lambda: own.step(optimizer)


def in_registers(own: Any, optimizer: Any) -> Callable[[], Any]:
    adopted = adopt(optimizer, scaler=own)
    assert adopted.compiled, adopted.reason
    return adopted.step


def unscaled_before(own: Any, optimizer: Any) -> Callable[[], Any]:
    step = adopt(optimizer, scaler=own).step
    return lambda: (own.unscale_(optimizer), step())


def watched(own: Any, optimizer: Any) -> Callable[[], Any]:
    adopted = adopt(optimizer)
    loss_scale = LossScale(own, adopted)
    loss_scale.told = True
    adopted.set_guard(loss_scale)
    return lambda: (own.unscale_(optimizer), loss_scale.step(adopted.step))


@pytest.mark.parametrize("way", [in_registers, unscaled_before, watched, "own optimizer"])
@pytest.mark.parametrize("kind", PAIRS)
def test_against_torch_without_waiting(kind: str, way: Any) -> None:
    torchs, own = PAIRS[kind]
    expected, states = loop(torchs, of_torch, lambda step: True)
    # The first step moves counters to the device, and the host decides on the one that begins a dampened momentum.
    params, found = loop(*((own, of_torch) if way == "own optimizer" else (torchs, way)), lambda step: step == 0)
    assert found == states
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limits", [{"max_norm": 0.5}, {"clip_value": 0.1}], ids=["norm", "value"])
def test_clipping_does_not_wait_either(limits: dict[str, float]) -> None:
    def clipped(own: Any, optimizer: Any) -> Callable[[], Any]:
        return adopt(optimizer, scaler=own, **limits).step

    def by_torch(own: Any, optimizer: Any) -> Callable[[], Any]:
        params = optimizer.param_groups[0]["params"]

        def step() -> None:
            own.unscale_(optimizer)
            if "max_norm" in limits:
                torch.nn.utils.clip_grad_norm_(params, limits["max_norm"])
            else:
                torch.nn.utils.clip_grad_value_(params, limits["clip_value"])
            own.step(optimizer)

        return step

    params, found = loop(PAIRS["momentum"][0], clipped, lambda step: False)
    expected, states = loop(PAIRS["momentum"][0], by_torch, lambda step: True)
    assert found == states
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Spiked(lit_fast.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch).squeeze(-1) - batch.sum(-1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Watches(lit_fast.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.5}], ids=["plain", "norm"])
@pytest.mark.parametrize("window", [1, 2])
def test_the_trainer_against_a_loop_by_hand(window: int, clipping: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(4, 8, generator=generator) for _ in range(11)] + [torch.full((4, 8), 1e4)]
    module = Spiked().cuda()
    own, optimizer = torch.amp.GradScaler("cuda", growth_interval=3), module.configure_optimizers()
    for index, batch in enumerate(data):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = module.training_step(batch.cuda(), index)
        if index % window == 0:
            optimizer.zero_grad()
        own.scale(loss / window).backward()
        if index % window == window - 1:
            own.unscale_(optimizer)
            if clipping:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            own.step(optimizer)
            own.update()
    for callbacks in ([], [Watches()]):
        model = Spiked()
        plugin = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cuda", growth_interval=3))
        trainer = lit_fast.Trainer(
            accelerator="gpu", devices=1, max_epochs=1, plugins=plugin, accumulate_grad_batches=window, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks, **clipping,
        )  # fmt: skip
        trainer.fit(model, data)
        assert ("in memory: something can see them" in trainer.explain()) is bool(callbacks)
        assert plugin.scaler is not None and plugin.scaler.state_dict() == own.state_dict()
        for a, b in zip(model.parameters(), module.parameters(), strict=True):
            # A hundredth of what Adam moves a weight by: a gradient that float16 rounds the other way moves it less.
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0.0, atol=1e-4)
