"""The step: its shape on the page, its frames on the stack, and its losses against a hand-written loop."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, network, trainer
from torch import Tensor, nn

import lit_fast
from lit_fast import ops, step

PACKAGE = str(Path(lit_fast.__file__).parent)
STEPS = 200


def our_frames(frame: FrameType | None, until: str) -> list[str]:
    """Names of the functions of ours on the stack, innermost first, up to `until`."""
    names = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)
            if frame.f_code.co_name == until:
                return names
        frame = frame.f_back
    raise AssertionError(f"{until} is not on the stack")


# -- shape


def test_no_if_in_either_shape() -> None:
    tree = ast.parse(Path(step.__file__).read_text())
    shapes = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(shapes) == {"inline", "closure"}
    for function in shapes.values():
        branches = (ast.If, ast.IfExp, ast.Try, ast.BoolOp, ast.While, ast.Match)
        assert not [node for node in ast.walk(function) if isinstance(node, branches)]


def test_step_is_one_screen() -> None:
    assert len(Path(step.__file__).read_text().splitlines()) <= 90


# -- frames


class CountsFrames(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.frames = our_frames(sys._getframe(1), "fit")
        return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]


def test_frames_from_fit_to_training_step(tmp_path: Path) -> None:
    model = CountsFrames()
    everything_on = lit_fast.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    everything_on.fit(model, batches(4))
    assert model.frames == ["inline", "run_epoch", "run", "fit"]
    assert len(model.frames) <= 5


def test_frames_from_fit_to_training_step_with_everything_else(tmp_path: Path) -> None:
    class Overrides(CountsFrames):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            self.steps_frames = len(our_frames(sys._getframe(1), "fit"))
            optimizer.step(closure=closure)

    model = Overrides()
    fitted(model, batches(4), max_epochs=1, gradient_clip_val=1.0, accumulate_grad_batches=2)
    assert model.steps_frames <= 5


def test_frames_from_the_step_to_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepest Python frame of ours that calls `_core` while the step runs."""
    seen: list[list[str]] = []

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and "_core" in str(getattr(arg, "__module__", "") or getattr(arg, "__self__", "")):
            stack: FrameType | None = frame
            names = []
            while stack is not None and stack.f_code.co_name != "inline":
                names.append(stack.f_code.co_name)
                stack = stack.f_back
            if stack is not None:
                seen.append([*names, "inline"])

    class Watched(Plain):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 2:
                sys.setprofile(watch)
            return super().training_step(batch, batch_idx)

    try:
        fitted(Watched(), batches(6), max_epochs=1, gradient_clip_val=1.0)
    finally:
        sys.setprofile(None)
    assert seen, "the core was not called"
    assert max(len(names) for names in seen) <= 4, max(seen, key=len)


# -- losses: bit-equal with a loop written by hand


def hand_losses(
    optimizer_of: Any,
    data: list[Tensor],
    steps: int,
    window: int = 1,
    rescale: bool = False,
    clip: Any = None,
    scheduler_of: Any = None,
) -> tuple[list[float], nn.Module]:
    """`steps` micro-batches of the network of heart_models, as torch's own tutorials write the loop."""
    net = network()
    optimizer = optimizer_of(net.parameters())
    scheduler = scheduler_of(optimizer) if scheduler_of else None
    losses = []
    for index in range(steps):
        at = index % len(data)
        begin = at - at % window
        this_window = min(window, len(data) - begin)
        loss = (net(data[at]).squeeze(-1) - data[at].sum(-1)).square().mean()
        losses.append(loss.item())
        if at == begin:
            optimizer.zero_grad()
        (loss / (window if rescale else this_window)).backward()
        if at == begin + this_window - 1:
            if rescale and this_window < window:
                for parameter in net.parameters():
                    parameter.grad.mul_(window / this_window)
            if clip is not None:
                clip(list(net.parameters()))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return losses, net


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_bit_equal(name: str) -> None:
    data = batches(20)
    model = Plain(OPTIMIZERS[name])
    fitted(model, data, max_steps=STEPS)
    expected, net = hand_losses(OPTIMIZERS[name], data, STEPS)
    assert model.losses == expected
    for ours, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window", [2, 3, 4, 7, 32])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "no_length"])
def test_accumulation_bit_equal(window: int, sized: bool) -> None:
    """20 batches an epoch: windows of 2 and 4 divide them, those of 3, 7 and 32 do not."""
    data = batches(20)
    optimizer = OPTIMIZERS["adamw_fused"]
    model = Plain(optimizer)
    made = fitted(model, data if sized else NoLength(data), max_epochs=10, accumulate_grad_batches=window)
    expected, _ = hand_losses(optimizer, data, 200, window)
    assert made.global_step == 10 * -(-20 // window)
    short = 20 % window
    if sized or short == 0:
        assert model.losses == expected
        return
    # Without a length the shortness is known only at the last micro-batch: each one was weighted with 1 / window, and
    # the sum is multiplied by window / short, which is the same number, rounded at another place.
    expected, _ = hand_losses(optimizer, data, 200, window, rescale=True)
    assert model.losses == expected


def test_accumulation_over_a_limited_iterable_without_length() -> None:
    data = batches(7)
    optimizer = OPTIMIZERS["sgd"]
    limited, short = Plain(optimizer), Plain(optimizer)
    fitted(limited, NoLength(data), max_epochs=3, limit_train_batches=5, accumulate_grad_batches=2)
    fitted(short, NoLength(data[:5]), max_epochs=3, limit_train_batches=100, accumulate_grad_batches=2)
    assert len(limited.losses) == 15
    assert limited.losses == short.losses
    expected, _ = hand_losses(optimizer, data[:5], 15, window=2)
    # windows of 2, and a last one of 1 whose weight 1/2 is doubled: both exact
    assert limited.losses == expected


def test_clip_by_value_bit_equal() -> None:
    data = batches(20)
    optimizer = OPTIMIZERS["sgd_momentum"]
    model = Plain(optimizer)
    made = fitted(model, data, max_steps=STEPS, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert made.fit_loop.plans is not None and not made.fit_loop.plans.binding.stepping.in_place_clipping
    expected, _ = hand_losses(optimizer, data, STEPS, clip=lambda p: nn.utils.clip_grad_value_(p, 0.1))
    assert model.losses == expected


def test_clip_by_value_in_place_bit_equal() -> None:
    class Watches(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            assert all(p.grad.abs().max() <= torch.tensor(0.1) for p in module.parameters())

    data = batches(20)
    optimizer = OPTIMIZERS["sgd_momentum"]
    model = Plain(optimizer)
    made = fitted(
        model, data, max_steps=STEPS, gradient_clip_val=0.1, gradient_clip_algorithm="value", callbacks=Watches()
    )
    assert made.fit_loop.plans is not None and made.fit_loop.plans.binding.stepping.in_place_clipping
    expected, _ = hand_losses(optimizer, data, STEPS, clip=lambda p: nn.utils.clip_grad_value_(p, 0.1))
    assert model.losses == expected


@pytest.mark.parametrize("in_place", [False, True], ids=["in_registers", "in_place"])
def test_one_step_clipped_by_norm(in_place: bool) -> None:
    """One SGD step of rate 1 moves the weights by the clipped gradient, which is compared with torch's.

    Both norms sum n squares in some order of float32 operations: relative error at most (n + 2) eps / 2 each, and the
    product, the division and the subtraction round once more.
    """

    class Sees(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in module.parameters()]))

    watcher = Sees()
    data = [10 * batch for batch in batches(1)]
    one = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731
    model = Plain(one)
    callbacks = [watcher] if in_place else []
    fitted(model, data, max_steps=1, gradient_clip_val=0.5, callbacks=callbacks)
    norms: list[Tensor] = []
    _, net = hand_losses(one, data, 1, clip=lambda p: norms.append(nn.utils.clip_grad_norm_(p, 0.5)))
    assert norms[0] > 1.0, "the gradient must be long enough to be clipped"
    count = sum(p.numel() for p in net.parameters())
    eps = torch.finfo(torch.float32).eps
    for ours, theirs, start in zip(model.parameters(), net.parameters(), network().parameters(), strict=True):
        moved = (theirs - start).abs()
        bound = (count + 6) * eps * moved + eps * torch.maximum(start.abs(), theirs.abs())
        assert bool(((ours - theirs).abs() <= bound).all())
        if in_place:
            assert torch.equal(ours, theirs), "in place it is torch's own clip_grad_norm_"
    if in_place:
        assert abs(watcher.norm.item() - 0.5) <= 0.5 * (count + 6) * eps


def test_clip_by_norm_in_place_is_torch_bit_for_bit() -> None:
    class Sees(lit_fast.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None: ...

    data = batches(20)
    optimizer = OPTIMIZERS["adamw_fused"]
    model = Plain(optimizer)
    fitted(model, data, max_steps=STEPS, gradient_clip_val=0.5, callbacks=Sees())
    expected, _ = hand_losses(optimizer, data, STEPS, clip=lambda p: nn.utils.clip_grad_norm_(p, 0.5))
    assert model.losses == expected


@pytest.mark.parametrize("limit", [0.5, 5.0, 1e3], ids=["always", "sometimes", "never"])
@pytest.mark.parametrize("name", ["adamw_fused", "adamax"])
def test_clip_by_norm_in_registers_is_torch_bit_for_bit(limit: float, name: str) -> None:
    data = batches(20)
    model = Plain(OPTIMIZERS[name])
    made = fitted(model, data, max_steps=STEPS, gradient_clip_val=limit)
    assert made.fit_loop.plans is not None and not made.fit_loop.plans.binding.stepping.in_place_clipping
    expected, _ = hand_losses(OPTIMIZERS[name], data, STEPS, clip=lambda p: nn.utils.clip_grad_norm_(p, limit))
    assert model.losses == expected


def test_clip_of_an_optimizer_that_evaluates_the_loss_itself() -> None:
    """Each evaluation's gradients are clipped."""

    def configure(parameters: Any) -> Any:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    data = batches(4)
    model = Plain(configure)
    fitted(model, data, max_epochs=1, gradient_clip_val=0.5)
    net = network()
    optimizer, expected = configure(net.parameters()), []
    for batch in data:

        def closure(batch: Tensor = batch) -> Tensor:
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            return loss

        optimizer.step(closure)
    assert model.losses == expected


def test_hooks_on_the_optimizer_see_clipped_gradients() -> None:
    seen: list[float] = []

    def configure(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
            seen.append(torch.linalg.vector_norm(torch.cat(gradients)).item())

        optimizer.register_step_pre_hook(hook)
        return optimizer

    model = Plain(configure)
    fitted(model, [10 * batch for batch in batches(3)], max_epochs=1, gradient_clip_val=0.5)
    assert len(seen) == 3
    count = sum(p.numel() for p in model.parameters())
    assert all(abs(norm - 0.5) <= 0.5 * (count + 6) * torch.finfo(torch.float32).eps for norm in seen)


def test_closure_shape_gives_the_same_losses() -> None:
    class Overrides(Plain):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            optimizer.step(closure=closure)

    data = batches(20)
    for options in ({}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}):
        inline, closure = Plain(OPTIMIZERS["adamw_fused"]), Overrides(OPTIMIZERS["adamw_fused"])
        first = fitted(inline, data, max_epochs=3, **options)
        second = fitted(closure, data, max_epochs=3, **options)
        assert first.fit_loop.plans.whole.run is step.inline
        assert second.fit_loop.plans.whole.run is step.closure
        assert closure.losses == inline.losses


def test_lbfgs_through_the_closure_shape() -> None:
    def configure(parameters: Any) -> Any:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    data = batches(5)
    model = Plain(configure)
    made = fitted(model, data, max_epochs=3)
    assert made.fit_loop.plans.whole.run is step.closure
    assert made.global_step == 15
    net = network()
    optimizer, expected = configure(net.parameters()), []
    for _ in range(3):
        for batch in data:

            def closure(batch: Tensor = batch) -> Tensor:
                loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
                expected.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert len(expected) > 15
    assert model.losses == expected


def test_manual_optimization_with_two_optimizers_bit_equal() -> None:
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return (
                torch.optim.SGD(self.net[0].parameters(), lr=0.01, momentum=0.9),
                torch.optim.AdamW(self.net[2].parameters(), lr=0.01, fused=True),
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            loss = self.loss(batch)
            self.losses.append(loss.item())
            first.zero_grad(set_to_none=True)
            second.zero_grad(set_to_none=False)
            self.manual_backward(loss)
            self.clip_gradients(first, 0.5, "value")
            first.step()
            if batch_idx % 2:
                second.step()

    data = batches(20)
    model = Two()
    made = fitted(model, data, max_epochs=10)
    assert made.global_step == 300
    net = network()
    first = torch.optim.SGD(net[0].parameters(), lr=0.01, momentum=0.9)
    second = torch.optim.AdamW(net[2].parameters(), lr=0.01, fused=True)
    expected = []
    for index in range(200):
        batch = data[index % 20]
        loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        expected.append(loss.item())
        first.zero_grad(set_to_none=True)
        second.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_value_(net[0].parameters(), 0.5)
        first.step()
        if index % 2:
            second.step()
    assert model.losses == expected


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedulers_bit_equal(interval: str) -> None:
    def scheduler_of(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=300)

    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS["adamw_fused"](self.parameters())
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler_of(optimizer), "interval": interval},
            }

    data = batches(20)
    model = Scheduled()
    fitted(model, data, max_epochs=10)
    if interval == "step":
        expected, _ = hand_losses(OPTIMIZERS["adamw_fused"], data, 200, scheduler_of=scheduler_of)
        assert model.losses == expected
        return
    net = network()
    optimizer = OPTIMIZERS["adamw_fused"](net.parameters())
    scheduler, expected = scheduler_of(optimizer), []
    for _ in range(10):
        for batch in data:
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    assert model.losses == expected


def test_parameters_added_and_frozen_during_the_run() -> None:
    """State tensors, parameters and gradients are read anew each step."""

    class Grows(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[0].bias.requires_grad_(False)
                self.extra = nn.Parameter(torch.ones(()))
                self.optimizers().add_param_group({"params": [self.extra], "lr": 0.5})

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * getattr(self, "extra", 1.0)

    model = Grows(OPTIMIZERS["sgd_momentum"])
    fitted(model, batches(3), max_epochs=2)
    assert model.extra.item() < 1.0


def test_trainer_forgets_nothing_between_two_fits() -> None:
    """A second fit with more epochs goes on: optimizers are configured anew, as in Lightning."""
    model = Plain()
    made = trainer(max_epochs=2)
    made.fit(model, batches(5))
    assert made.current_epoch == 2 and made.global_step == 10
    made.fit_loop.max_epochs = 3
    made.fit(model, batches(5))
    assert made.current_epoch == 3 and made.global_step == 15


def test_core_is_there() -> None:
    assert "cpu_target" in ops.build_info()
