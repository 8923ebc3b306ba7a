"""Every precision: dtypes, learning, going on from a checkpoint; and precisions that users write."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import QUIET, Plain, batches, fitted, network, trainer

import lit_fast
from lit_fast import step
from lit_fast.precision import Precision


class Dtypes(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = batch.dtype, self.net(batch).dtype, torch.empty(0).dtype
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "precision,batch,output,default,weights",
    [
        ("32-true", torch.float32, torch.float32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16, torch.float16, torch.float16),
        ("64-true", torch.float64, torch.float64, torch.float64, torch.float64),
    ],
)
def test_dtypes_and_falling_loss(precision: str, batch: Any, output: Any, default: Any, weights: Any) -> None:
    eps = 1e-8 if precision != "16-true" else 1e-4  # 1e-8 is 0 in float16
    model = Dtypes(lambda p: torch.optim.AdamW(p, lr=0.02, eps=eps))
    fitted(model, batches(10), max_epochs=10, precision=precision)
    assert model.seen == (batch, output, default)
    assert {p.dtype for p in model.parameters()} == {weights}
    assert torch.empty(0).dtype == torch.float32, "the default dtype is put back"
    first, last = sum(model.losses[:10]), sum(model.losses[-10:])
    assert last < 0.5 * first


def test_bf16_mixed_equals_autocast_by_hand() -> None:
    data = batches(10)
    optimizer_of = lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)  # noqa: E731
    model = Plain(optimizer_of)
    fitted(model, data, max_steps=50, precision="bf16-mixed")
    net = network()
    optimizer, expected = optimizer_of(net.parameters()), []
    for index in range(50):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (net(data[index % 10]).squeeze(-1) - data[index % 10].sum(-1)).square().mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.losses == expected


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_goes_on_from_a_checkpoint(precision: str, tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> list[float]:
        model = Plain(lambda p: torch.optim.AdamW(p, lr=0.02))
        made = lit_fast.Trainer(**{**QUIET, "max_steps": steps, "precision": precision})
        made.fit(model, batches(7), ckpt_path=options.get("ckpt_path"))
        made.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model.losses

    straight = run(20)
    assert run(10) + run(20, ckpt_path=tmp_path / "10.ckpt") == straight


def test_batches_are_cast_wherever_they_lie() -> None:
    class Nested(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch["x"][0].dtype == torch.bfloat16 and batch["i"].dtype == torch.int64 and batch["t"] == "text"
            return super().training_step(batch["x"][0], batch_idx)

    data = [{"x": [batch], "i": torch.arange(3), "t": "text"} for batch in batches(2)]
    fitted(Nested(), data, max_epochs=1, precision="bf16-true")


def test_double_is_bit_equal_with_a_loop_in_float64() -> None:
    data = batches(10)
    model = Plain(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9))
    fitted(model, data, max_steps=50, precision="64-true")
    net = network().double()
    optimizer, expected = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), []
    for index in range(50):
        batch = data[index % 10].double()
        loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.losses == expected


# -- precisions that users write


class Records(Precision):
    """Overrides everything that a Trainer calls, and writes down what it was called with."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def connect(self, model: Any, optimizers: Any, lr_schedulers: Any) -> Any:
        self.calls.append("connect")
        return super().connect(model, optimizers, lr_schedulers)

    def convert_module(self, module: Any) -> Any:
        self.calls.append("convert_module")
        return super().convert_module(module)

    def convert_input(self, data: Any) -> Any:
        self.calls.append("convert_input")
        return super().convert_input(data)

    @contextmanager
    def train_step_context(self) -> Any:
        self.calls.append("train_step_context")
        with super().train_step_context():
            yield
        self.calls.append("train_step_context left")

    @contextmanager
    def val_step_context(self) -> Any:
        self.calls.append("val_step_context")
        with super().val_step_context():
            yield

    def pre_backward(self, tensor: Any, module: Any) -> Any:
        self.calls.append("pre_backward")
        return super().pre_backward(tensor, module) * 2

    def backward(self, tensor: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append(f"backward {type(optimizer).__name__}")
        super().backward(tensor, model, optimizer, *args, **kwargs)

    def post_backward(self, tensor: Any, module: Any) -> Any:
        self.calls.append("post_backward")
        return super().post_backward(tensor, module)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        self.calls.append(f"optimizer_step {type(optimizer).__name__}")
        return super().optimizer_step(optimizer, model, closure, **kwargs)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: Any) -> None:
        self.calls.append(f"clip_grad_by_norm {clip_val}")
        super().clip_grad_by_norm(optimizer, clip_val)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append(f"load_state_dict {sorted(state_dict)}")

    def teardown(self) -> None:
        self.calls.append("teardown")


class Hooked(Plain):
    def on_before_backward(self, loss: Any) -> None:
        self.trainer.precision_plugin.calls.append("on_before_backward")

    def on_after_backward(self) -> None:
        self.trainer.precision_plugin.calls.append("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.trainer.precision_plugin.calls.append("on_before_optimizer_step")

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def test_every_method_of_a_plugin_is_called_where_lightning_calls_it(tmp_path: Path) -> None:
    """The order is what Lightning 2.6.6 recorded for the same program."""
    plugin = Records()
    made = fitted(
        Hooked(), batches(1), [batches(1)], max_epochs=1, plugins=plugin, gradient_clip_val=0.5, num_sanity_val_steps=0
    )
    step = [
        "convert_input", "optimizer_step SGD", "train_step_context", "train_step_context left", "pre_backward",
        "on_before_backward", "backward SGD", "post_backward", "on_after_backward", "on_before_optimizer_step",
        "clip_grad_by_norm 0.5",
    ]  # fmt: skip
    assert plugin.calls == ["convert_module", "connect", *step, "convert_input", "val_step_context", "teardown"]
    made.save_checkpoint(tmp_path / "a.ckpt")
    again = Records()
    trainer(max_epochs=2, plugins=again).fit(Plain(), batches(1), ckpt_path=tmp_path / "a.ckpt")
    assert "load_state_dict ['calls']" in again.calls


def test_what_a_plugin_changes_takes_effect() -> None:
    """Records doubles the loss, which doubles the gradients: as a learning rate twice as large for plain SGD."""
    data = batches(6)
    doubled, plain = Plain(), Plain(lambda p: torch.optim.SGD(p, lr=0.1))
    fitted(doubled, data, max_epochs=2, plugins=Records())
    fitted(plain, data, max_epochs=2)
    assert doubled.losses == plain.losses


def test_a_plugin_in_manual_optimization() -> None:
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    plugin = Records()
    made = fitted(Manual(), batches(1), max_epochs=1, plugins=plugin)
    assert plugin.calls[2:-1] == [
        "convert_input", "train_step_context", "pre_backward", "backward NoneType", "post_backward",
        "optimizer_step SGD", "train_step_context left",
    ]  # fmt: skip
    assert made.global_step == 1


def test_a_plugin_that_overrides_nothing_binds_nothing() -> None:
    class Named(Precision):
        precision = "32-true"

    model = Plain()
    made = fitted(model, batches(1), max_epochs=1, plugins=Named())
    plan = made.fit_loop.plans.kind(True, True, 1)
    assert plan.training_step == model.training_step and plan.run is step.inline
    assert not (plan.receive or plan.on_before_backward or plan.on_after_backward or plan.clip)
