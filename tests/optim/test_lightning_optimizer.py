"""The optimizer that user code holds: hooks, counting and closures of its `step`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted

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


def test_it_passes_for_the_wrapped_optimizer() -> None:
    """As a scheduler asks, and an `optimizer_step` that treats some optimizers differently."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4)
    wrapped = LightningOptimizer(optimizer)
    assert isinstance(wrapped, LightningOptimizer)
    assert isinstance(wrapped, torch.optim.Optimizer)
    assert isinstance(wrapped, torch.optim.SGD)
    assert not isinstance(wrapped, torch.optim.LBFGS)
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped, step_size=1, gamma=0.5)
    wrapped.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_copy_is_bound_to_no_trainer() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    wrapper = LightningOptimizer(torch.optim.SGD([parameter], lr=0.5))
    wrapper.bind(lambda closure=None: pytest.fail("the Trainer's step ran"), lambda: None, [wrapper.optimizer])
    for copied in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        own = copied.param_groups[0]["params"][0]
        own.grad = torch.ones(2)
        copied.step()
        assert own.tolist() == [0.5, 0.5] and parameter.tolist() == [1.0, 1.0]


def test_it_is_of_the_class_that_it_wraps() -> None:
    class Rated(torch.optim.AdamW):
        limit = 3

        def set_rate(self, rate: float) -> str:
            self.rate = rate
            return type(self).__name__

    inner = Rated([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    wrapped: Any = LightningOptimizer(inner)
    assert type(wrapped).__name__ == wrapped.__class__.__name__ == "LightningRated"
    assert isinstance(wrapped, torch.optim.AdamW) and isinstance(wrapped, LightningOptimizer)
    assert issubclass(type(wrapped), Rated) and wrapped.optimizer is inner and type(wrapped).limit == 3
    assert repr(wrapped).startswith("LightningRated (\nParameter Group 0")
    # methods run on the wrapped one: what they assign arrives there
    assert wrapped.set_rate(0.5) == "Rated" and inner.rate == 0.5
    inner.param_groups[0]["lr"] = 0.2
    saved = inner.state_dict()
    inner.param_groups[0]["lr"] = 0.3
    wrapped.load_state_dict(saved)
    assert inner.param_groups[0]["lr"] == wrapped.param_groups[0]["lr"] == 0.2
    wrapped.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert len(inner.param_groups) == 2


def test_optimizers_of_a_run_are_told_apart_by_class() -> None:
    seen: list[str] = []

    class Steps(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            seen.append(type(optimizer).__name__)
            assert isinstance(optimizer, torch.optim.SGD) and not isinstance(optimizer, torch.optim.Adam)
            assert torch.optim.lr_scheduler.StepLR(optimizer, 1).optimizer is optimizer
            assert type(self.optimizers(use_pl_optimizer=False)) is torch.optim.SGD

    fitted(Steps(), batches(1), max_epochs=1)
    assert seen == ["LightningSGD"]
