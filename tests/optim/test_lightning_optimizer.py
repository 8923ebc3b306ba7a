"""The optimizer that user code holds: hooks, counting and closures of its `step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, network

from lit_fast.errors import MisconfigurationException
from lit_fast.optim.lightning_optimizer import LightningOptimizer


class Manual(Plain):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.order: list[str] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.order.append("before_step")

    def on_before_backward(self, loss: Any) -> None:
        self.order.append("before_backward")

    def on_after_backward(self) -> None:
        self.order.append("after_backward")


def test_step_runs_hooks_and_counts() -> None:
    class Steps(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            assert all(p.grad is None for p in self.parameters())
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert all(not p.grad.any() for p in self.parameters())

    model = Steps()
    made = fitted(model, batches(3), max_epochs=1)
    assert made.global_step == 3
    assert model.order == ["before_backward", "after_backward", "before_step"] * 3


def test_closure_runs_before_the_hooks() -> None:
    class Steps(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Any:
                self.order.append("closure")
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            assert optimizer.step(closure=closure) is not None

    model = Steps()
    assert fitted(model, batches(1), max_epochs=1).global_step == 1
    assert model.order == ["closure", "before_backward", "after_backward", "before_step"]


def test_lbfgs_by_hand_calls_the_closure_again() -> None:
    class Steps(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.losses.append(loss.item())
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    model = Steps(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5))
    fitted(model, batches(1), max_epochs=1)
    assert len(model.losses) > 1 and model.losses[-1] < model.losses[0]


def test_what_is_wrapped_shows_through() -> None:
    class Steps(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert optimizer.defaults["lr"] == 0.05 and "SGD" in repr(optimizer)
            optimizer.param_groups[0]["lr"] = 0.5
            assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
            with pytest.raises(TypeError, match="closure must be callable"):
                optimizer.step(closure=3)
            with pytest.raises(AttributeError):
                _ = optimizer.nothing_of_that_name

    fitted(Steps(), batches(1), max_epochs=1)


def test_it_is_an_optimizer_of_its_kind() -> None:
    class Looks(Plain):
        def on_train_start(self) -> None:
            optimizer = self.optimizers()
            assert isinstance(optimizer, torch.optim.SGD) and isinstance(optimizer, LightningOptimizer)
            assert optimizer is self.optimizers() and self.optimizers(use_pl_optimizer=False) is optimizer.optimizer
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
            assert len(self.trainer.optimizers[0].param_groups) == 2
            state = optimizer.state_dict()
            state["param_groups"][0]["lr"] = 0.25
            optimizer.load_state_dict(state)
            assert self.trainer.optimizers[0].param_groups[0]["lr"] == 0.25, "the wrapped one was loaded"

    fitted(Looks(), batches(1), max_epochs=1)


def test_toggle_model_goes_through_the_module() -> None:
    class Toggles(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

        def toggle_optimizer(self, optimizer: Any) -> None:
            self.order.append("toggle")
            super().toggle_optimizer(optimizer)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.net[2].bias.requires_grad = False
            first, second = self.optimizers()
            with first.toggle_model():
                assert [p.requires_grad for p in self.net.parameters()] == [True, True, False, False]
            with second.toggle_model(sync_grad=False):
                assert [p.requires_grad for p in self.net.parameters()] == [False, False, True, False]
            assert [p.requires_grad for p in self.net.parameters()] == [True, True, True, False]

    model = Toggles()
    fitted(model, batches(1), max_epochs=1)
    assert model.order == ["toggle", "toggle"]


# -- an overridden optimizer_step


def stepping(how: Any) -> Plain:
    class Steps(Plain):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            how(optimizer, optimizer_closure)

    return Steps()


def test_ways_to_step() -> None:
    """Closure handed on, called before, called before the raw optimizer: one step of the same bits."""
    ways = [
        lambda optimizer, closure: optimizer.step(closure),
        lambda optimizer, closure: optimizer.step(closure=closure),
        lambda optimizer, closure: (closure(), optimizer.step()),
        lambda optimizer, closure: (closure(), optimizer.optimizer.step()),
    ]
    losses = []
    for way in ways:
        model = stepping(way)
        assert fitted(model, batches(4), max_epochs=2).global_step == 8
        losses.append(model.losses)
    plain = Plain()
    fitted(plain, batches(4), max_epochs=2)
    assert losses == [plain.losses] * 4


def test_a_closure_that_runs_twice_or_never() -> None:
    twice = stepping(lambda optimizer, closure: (optimizer.step(closure), optimizer.step(closure)))
    assert fitted(twice, batches(4), max_epochs=1).global_step == 4, "as Lightning counts"
    assert len(twice.losses) == 8
    for way in (lambda optimizer, closure: None, lambda optimizer, closure: optimizer.step()):
        with pytest.raises(MisconfigurationException, match="did not run the closure"):
            fitted(stepping(way), batches(1), max_epochs=1)


# -- optimizers of somebody else


class TwoSteps(torch.optim.SGD):
    """Calls its closure twice a step, as sharpness-aware optimizers do."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "such an optimizer needs its closure"
        with torch.enable_grad():
            closure()
            super().step()
            loss = closure()
        super().step()
        return loss


class LooksLikeOne:
    """No `torch.optim.Optimizer`, but everything that one has; `zero_grad` takes no argument."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def test_an_optimizer_that_calls_its_closure_twice() -> None:
    model = Plain(lambda p: TwoSteps(p, lr=0.05))
    made = fitted(model, batches(4), max_epochs=2)
    assert made.global_step == 8
    net, optimizer, expected = network(), None, []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for batch in batches(4) * 2:
        for _ in range(2):
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert model.losses == expected


def test_an_optimizer_that_derives_from_nothing() -> None:
    model, plain = Plain(lambda p: LooksLikeOne(torch.optim.SGD(p, lr=0.05))), Plain()
    fitted(model, batches(4), max_epochs=2)
    fitted(plain, batches(4), max_epochs=2)
    assert model.losses == plain.losses
