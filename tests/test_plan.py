"""What is bound: nothing for what is not used; and what `explain()` says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, trainer
from torch import Tensor

import lit_fast
from lit_fast.backward import read_losses
from lit_fast.binding import StepPlan
from lit_fast.errors import MisconfigurationException


def bound(plan: StepPlan) -> dict[str, int]:
    """Callables at each point that has any."""
    points = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: len(value) for name, value in points.items() if isinstance(value, tuple) and value}


def test_nothing_is_bound_for_what_is_not_used() -> None:
    model = Plain()
    made = fitted(model, batches(2), max_epochs=1)
    plan = made.fit_loop.plans.kind(True, True, 1)
    assert bound(plan) == {"zero_grad": 1, "update": 1}
    assert plan.training_step == model.training_step, "the user's own method, without a wrapper"
    assert plan.losses is read_losses


def test_the_default_callbacks_bind_what_they_need_only(tmp_path: Any) -> None:
    made = lit_fast.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    made.fit(Plain(), batches(2))
    assert bound(made.fit_loop.plans.kind(True, True, 1)) == {"zero_grad": 1, "update": 1}


def test_every_point_that_is_used_is_bound() -> None:
    class All(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
        def on_before_backward(self, loss: Tensor) -> None: ...
        def on_after_backward(self) -> None: ...
        def on_before_zero_grad(self, optimizer: Any) -> None: ...
        def on_before_optimizer_step(self, optimizer: Any) -> None: ...
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    made = fitted(All(), batches(2), max_epochs=1, gradient_clip_val=1.0)
    assert bound(made.fit_loop.plans.kind(True, True, 1)) == {
        "receive": 2, "on_train_batch_start": 1, "zero_grad": 2, "on_before_backward": 1, "on_after_backward": 1,
        "on_before_optimizer_step": 1, "clip": 1, "update": 1, "on_train_batch_end": 1,
    }  # fmt: skip


def test_plans_of_a_window() -> None:
    made = fitted(Plain(), batches(5), max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0)
    plans = made.fit_loop.plans
    first, last = plans.kind(True, False, 2), plans.kind(False, True, 2)
    assert bound(first) == {"zero_grad": 1} and first.steps == 0
    assert bound(last) == {"update": 1} and last.steps == 1
    made_plans = list(zip(range(5), plans.windows(0, 5), strict=False))
    assert [plan.steps for _, plan in made_plans] == [0, 1, 0, 1, 1]
    assert made_plans[4][1] is plans.kind(True, True, 1)
    assert [plan.steps for _, plan in zip(range(2), plans.windows(3, 5), strict=False)] == [1, 1]


# -- explain


def test_explain_before_during_and_after() -> None:
    class Asks(Plain):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.during = self.trainer.explain()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step", "frequency": 2}
            ]

    class Watches(lit_fast.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None: ...

    model = Asks()
    made = trainer(max_epochs=1, gradient_clip_val=0.5, callbacks=Watches())
    with pytest.raises(MisconfigurationException, match="pass the model"):
        made.explain()
    before = made.explain(model)
    assert made.optimizers == [] and model._trainer is None, "a look changes nothing"
    made.fit(model, batches(3))
    after = made.explain()
    for text in (before, model.during, after):
        lines = text.splitlines()
        assert "Asks on cpu, inline shape, windows of 1 micro-batch" in lines[0]
        points = [line.split()[0] for line in lines[1:]]
        order = [
            "training_step", "zero_grad", "backward", "on_after_backward", "clip", "update", "schedulers",
            "on_train_batch_end", "allocator",
        ]  # fmt: skip
        assert [point for point in points if point in order] == order
        row = {line.split()[0]: line for line in lines[1:]}
        assert "Asks.training_step" in row["training_step"] and "32-true" in row["training_step"]
        assert "Watches" in row["on_after_backward"] and "Asks" in row["on_train_batch_end"]
        assert "by norm 0.5, in place: a hook can see" in row["clip"]
        assert "compiled step (adam" in row["update"]
        assert "StepLR" in row["schedulers"] and "every 2 step(s)" in row["schedulers"]
    assert "resume" in after


def test_explain_says_why_a_step_is_not_compiled() -> None:
    made = fitted(Plain(torch.optim.Adamax), batches(2), max_epochs=1, gradient_clip_val=0.5)
    assert "its own step, because Adamax has no compiled kernel" in made.explain()
    assert "in registers" in made.explain() or "before" in made.explain()

    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    made = fitted(Plain(lambda p: Mine(p, lr=0.1)), batches(2), max_epochs=1)
    assert "because its step is not torch.optim.SGD's" in made.explain()


def test_explain_of_the_allocator() -> None:
    made = fitted(Plain(), batches(2), max_epochs=1, keep_freed_memory=False)
    assert "left as it was (keep_freed_memory=False)" in made.explain()
    made = fitted(Plain(), batches(2), max_epochs=1)
    assert "left as it was" not in made.explain()


def test_explain_with_a_profiler_shows_costs() -> None:
    made = fitted(Plain(), batches(4), max_epochs=1, profiler="step")
    assert "forward: " in made.explain() and "us a step" in made.explain()


def test_explain_of_a_compiled_module_leaves_it_alone() -> None:
    model = Plain()
    compiled = torch.compile(model, backend="eager")
    before = set(model.__dict__)
    assert "Plain" in trainer().explain(compiled)
    assert set(model.__dict__) - before <= {"_trainer", "_metric_log"}


# -- what training_step may return


@pytest.mark.parametrize("loss", ["a loss", torch.ones(3), {"los": torch.ones(())}, [torch.ones(())], 1.5, object()])
def test_wrong_returns_of_training_step(loss: Any) -> None:
    class Wrong(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss

    with pytest.raises(MisconfigurationException, match="training_step returned"):
        fitted(Wrong(), batches(2), max_epochs=1)


def test_a_loss_of_one_element_and_a_dict_are_right() -> None:
    class OneElement(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return [loss.reshape(1), {"loss": loss, "more": 1}][batch_idx % 2]

    one, plain = OneElement(), Plain()
    fitted(one, batches(6), max_epochs=2)
    fitted(plain, batches(6), max_epochs=2)
    assert one.losses == plain.losses


def test_a_loss_without_a_graph() -> None:
    class Detached(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        fitted(Detached(), batches(2), max_epochs=1)


# -- bound anew


class AtEpochs(lit_fast.Callback):
    """Calls `change[epoch](trainer, module)` as that epoch starts."""

    def __init__(self, **change: Any) -> None:
        self.change = change

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.change.get(f"at_{trainer.current_epoch}", lambda *_: None)(trainer, pl_module)


def test_nothing_changed_is_not_bound_again() -> None:
    class Sees(Plain):
        def on_train_epoch_end(self) -> None:
            self.bindings = [*getattr(self, "bindings", []), self.trainer.fit_loop.plans.binding]

    model = Sees()
    fitted(model, batches(2), max_epochs=3)
    assert len(model.bindings) == 3 and len({id(binding) for binding in model.bindings}) == 1


def test_windows_may_change_between_epochs() -> None:
    """Epochs of 5 batches in windows of 2, 1 and 4: 3 + 5 + 2 steps, as a hand-written loop takes them."""
    steps: list[tuple[int, int]] = []

    class Counts(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            steps.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))

    def window(length: int) -> Any:
        return lambda trainer, module: setattr(trainer, "accumulate_grad_batches", length)

    data, model = batches(5), Plain()
    change = AtEpochs(at_0=window(2), at_1=window(1), at_2=window(4))
    made = fitted(model, data, max_epochs=3, callbacks=[change, Counts()])
    assert [step for step, _ in steps] == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 9, 10]
    assert [before for _, before in steps] == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 9]
    assert made.global_step == made.fit_loop.windows_completed() == 10

    net = Plain().net
    optimizer, expected = torch.optim.SGD(net.parameters(), lr=0.05), []
    for length in (2, 1, 4):
        for begin in range(0, 5, length):
            optimizer.zero_grad()
            for batch in data[begin : begin + length]:
                loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
                expected.append(loss.item())
                (loss / len(data[begin : begin + length])).backward()
            optimizer.step()
    assert model.losses == expected


def test_optimizers_and_clipping_may_change_between_epochs() -> None:
    held: list[Any] = []

    def clip(trainer: Any, module: Any) -> None:
        held.extend([trainer.fit_loop.plans.binding.stepping.adopted[0], module.optimizers()])
        trainer.gradient_clip_val, trainer.gradient_clip_algorithm = 0.1, "value"

    def replace(trainer: Any, module: Any) -> None:
        held.extend([trainer.fit_loop.plans.binding.stepping.adopted[0], module.optimizers()])
        trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.01)]

    data, model = batches(4), Plain()
    made = fitted(model, data, max_epochs=3, callbacks=AtEpochs(at_1=clip, at_2=replace))
    assert held[0] is held[2] and held[1] is held[3], "an optimizer that stays is not adopted anew"
    assert made.strategy.optimizers is made.optimizers
    assert model.optimizers().optimizer is made.optimizers[0]
    assert "by value 0.1, in place" in made.explain()

    net, expected = Plain().net, []
    for epoch in range(3):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01 if epoch == 2 else 0.05)
        for batch in data:
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            if epoch:
                torch.nn.utils.clip_grad_value_(net.parameters(), 0.1)
            optimizer.step()
    assert model.losses == expected


def test_a_step_or_a_callback_put_there_as_the_fit_starts_is_bound() -> None:
    calls: list[str] = []

    class Late(lit_fast.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            calls.append("late")

    class Patches(lit_fast.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.callbacks.append(Late())

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            inner = pl_module.training_step
            pl_module.training_step = lambda batch, batch_idx: (calls.append("patched"), inner(batch, batch_idx))[1]

    fitted(Plain(), batches(2), max_epochs=1, callbacks=Patches())
    assert calls == ["patched", "late"] * 2
