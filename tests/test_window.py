"""Windows of accumulated gradients: losses that come with weights, and what `p.grad` shows meanwhile."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lit_fast
from lit_fast import window as window_module
from lit_fast.errors import MisconfigurationException
from lit_fast.optim import AdoptedOptimizer
from lit_fast.precision import MixedPrecision
from lit_fast.strategies import Strategy

WEIGHTS = [3, 1, 7, 0, 5, 2, 9, 4, 4, 1, 8]  # windows of 4 and 3 end an epoch of these early


class Weighted(Plain):
    """Its micro-batches weigh what `weights` says: None stands for a loss without."""

    def __init__(self, weights: list[Any], optimizer: Any = None) -> None:
        super().__init__(optimizer)
        self.weights = weights

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, weight = self.loss(batch), self.weights[batch_idx]
        return loss if weight is None else {"loss": loss, "weight": weight}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
CLIPPING: dict[str, tuple[dict[str, Any], Any]] = {
    "unclipped": ({}, lambda parameters: None),
    "norm": ({"gradient_clip_val": 0.5}, lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5)),
    "value": (
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        lambda parameters: nn.utils.clip_grad_value_(parameters, 0.1),
    ),
}


def by_hand(
    optimizer_of: Any, clip: Any, window: int | list[int], weights: list[int], epochs: int, dtype: torch.dtype,
    shares: bool = False,
) -> nn.Module:  # fmt: skip
    """The weighted mean of each window's gradients, as a loop that knows all weights beforehand.

    With `shares` in the order of rounding of a loop that does not: seeds of w / w_1 / N, and one product at the end.
    """
    net = network().to(dtype)
    data = [batch.to(dtype) for batch in batches(len(weights))]
    optimizer = optimizer_of(net.parameters())
    windows = [window] * epochs if isinstance(window, int) else window
    for window in windows:
        for begin in range(0, len(weights), window):
            places = [at for at in range(begin, min(begin + window, len(weights))) if weights[at]]
            length = min(window, len(weights) - begin)
            optimizer.zero_grad()
            for at in places:
                loss = (net(data[at]).squeeze(-1) - data[at].sum(-1)).square().mean()
                if shares and length > 1:
                    share = 1.0 / (length * (weights[places[0]] / weights[at]))
                    loss.backward(torch.tensor(share, dtype=dtype))
                else:
                    (loss * weights[at] / sum(weights[at] for at in places)).backward()
            if shares and length > 1:
                ratios = sum(weights[at] / weights[places[0]] for at in places)
                for parameter in net.parameters():
                    parameter.grad.mul_(length / ratios)
            clip(list(net.parameters()))
            optimizer.step()
    return net


def assert_same_bits(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


class Watches(lit_fast.Callback):
    def on_train_batch_end(self, *args: Any) -> None: ...


@pytest.mark.parametrize(("window", "sized"), [(1, True), (3, False), (4, True)])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_the_weighted_mean_of_uneven_windows(optimizer: str, clipping: str, window: int, sized: bool) -> None:
    """In float64, whose steps are torch's own, no further from the formula than its roundings."""
    weights = [weight or 6 for weight in WEIGHTS] if window == 1 else WEIGHTS
    options, clip = CLIPPING[clipping]
    model = Weighted(weights, OPTIMIZERS[optimizer])
    data = batches(len(weights))
    options = {"precision": "64-true", "accumulate_grad_batches": window, **options}
    fitted(model, data if sized else NoLength(data), max_epochs=2, **options)
    expected = by_hand(OPTIMIZERS[optimizer], clip, window, weights, 2, torch.float64)
    torch.testing.assert_close(model.net.state_dict(), expected.state_dict(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("watched", [False, True], ids=["in_registers", "in_place"])
def test_bits_of_a_loop_by_hand(optimizer: str, clipping: str, watched: bool) -> None:
    """The compiled step, which is handed the factor, and the gradients that a hook can see, which are multiplied."""
    options, clip = CLIPPING[clipping]
    model = Weighted(WEIGHTS, OPTIMIZERS[optimizer])
    callbacks = [Watches()] if watched else []
    made = fitted(model, batches(11), max_epochs=3, accumulate_grad_batches=4, callbacks=callbacks, **options)
    expected = by_hand(OPTIMIZERS[optimizer], clip, 4, WEIGHTS, 3, torch.float32, shares=True)
    if clipping == "norm" and not watched:  # the factor goes into the coefficient, one rounding less
        torch.testing.assert_close(model.net.state_dict(), expected.state_dict())
    else:
        assert_same_bits(model.net, expected)
    assert ("weighted mean, in registers" in made.explain()) is not watched
    assert ("their weighted mean, in place" in made.explain()) is watched
    assert "compiled step" in made.explain()


@pytest.mark.parametrize("weight", [1, 0.3, 17, torch.tensor(17), torch.tensor([0.3])], ids=str)
@pytest.mark.parametrize("window", [1, 3])
def test_equal_weights_are_no_weights(weight: Any, window: int) -> None:
    one, other = Weighted([weight] * 11, OPTIMIZERS["adamw"]), Weighted([None] * 11, OPTIMIZERS["adamw"])
    for model in (one, other):
        fitted(model, batches(11), max_epochs=1, accumulate_grad_batches=window, gradient_clip_val=0.5)
    assert_same_bits(one, other)


def test_a_window_of_one_is_its_loss() -> None:
    one, other = Weighted([0.1, 20.0, 3.0]), Weighted([None] * 3)
    made = [fitted(model, batches(3), max_epochs=2) for model in (one, other)]
    assert_same_bits(one, other)
    assert made[0].fit_loop.plans.binding.weights is None, "nothing was bound for them"


def test_windows_that_change_between_epochs() -> None:
    """A scheduler of windows has the plan bound anew, weights included; a window of one stands between."""
    model = Weighted([weight or 6 for weight in WEIGHTS])
    schedule = lit_fast.callbacks.GradientAccumulationScheduler({0: 2, 1: 1, 2: 4, 3: 3})
    made = fitted(model, batches(11), max_epochs=4, callbacks=[schedule], profiler="step")
    expected = by_hand(OPTIMIZERS["sgd"], lambda p: None, [2, 1, 4, 3], model.weights, 4, torch.float32, shares=True)
    assert_same_bits(model.net, expected)
    assert made.global_step == 6 + 11 + 3 + 4


# -- nothing


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)], ids=["int", "float", "tensor"])
def test_a_weight_of_0_leaves_a_batch_out(nothing: Any) -> None:
    """Its mean over no tokens may be no number."""

    class Empty(Weighted):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (math.nan if self.trainer.fit_loop.batch_idx == 1 else 1.0)

    for window in (1, 3):
        model, without = Empty([2, nothing, 5], OPTIMIZERS["sgd"]), Weighted([2, 5], OPTIMIZERS["sgd"])
        made = fitted(model, batches(3), max_epochs=1, accumulate_grad_batches=window)
        fitted(without, [batches(3)[0], batches(3)[2]], max_epochs=1, accumulate_grad_batches=min(window, 2))
        torch.testing.assert_close(model.net.state_dict(), without.net.state_dict())
        assert made.global_step == 3 // window


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_window_of_nothing_changes_nothing(precision: str) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if precision == "16-mixed" else None
    model = Weighted([0, 0, 0, 0])
    fitted(model, batches(4), max_epochs=1, accumulate_grad_batches=2, plugins=plugin)
    assert_same_bits(model.net, network())


# -- what cannot be meant


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1, "weight=-1"), (math.nan, "weight=nan"), (math.inf, "weight=inf"), (True, "weight=True"),
        ("7", "weight='7'"), ([7], r"weight=\[7\]"), (torch.tensor(-2.0), "weight=-2.0"),
        (torch.ones(2), r"shape \(2,\)"), (torch.ones((), dtype=torch.complex64), "complex64"),
        (torch.tensor(True), "torch.bool"),
    ],
    ids=str,
)  # fmt: skip
def test_a_weight_that_is_none(weight: Any, message: str, window: int) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fitted(Weighted([1, weight]), batches(2), max_epochs=1, accumulate_grad_batches=window)


@pytest.mark.parametrize("weights", [[2, None], [None, 2], [0, None], [2, 3, None, None]], ids=str)
def test_some_with_a_weight_and_some_without(weights: list[Any]) -> None:
    with pytest.raises(MisconfigurationException, match="without a 'weight'"):
        fitted(Weighted(weights), batches(len(weights)), max_epochs=1, accumulate_grad_batches=2)


def test_a_skipped_batch_needs_no_weight() -> None:
    class Skips(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)

    model = Skips(WEIGHTS)
    with pytest.warns(UserWarning, match="returned None"):
        fitted(model, batches(11), max_epochs=1, accumulate_grad_batches=4)
    kept = [0 if at % 3 == 0 else weight for at, weight in enumerate(WEIGHTS)]
    expected = by_hand(OPTIMIZERS["sgd"], lambda p: None, 4, kept, 1, torch.float32, shares=True)
    assert_same_bits(model.net, expected)


# -- who sees what


def mean_gradient(weights: list[int]) -> Tensor:
    """Of the first layer's weight, in a first window of these weights."""
    net, data = network().double(), [batch.double() for batch in batches(len(weights))]
    for batch, weight in zip(data, weights, strict=True):
        loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        (loss * weight / sum(weights)).backward()
    return net[0].weight.grad


class SeesGradients(Weighted):
    """Notes the gradient of the first layer wherever it is called; every variant below adds one place."""

    def __init__(self) -> None:
        super().__init__([3, 1, 7])
        self.seen: list[Tensor] = []

    def look(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.net[0].weight.grad.clone())


class BeforeStep(SeesGradients):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.look()


class AfterStep(SeesGradients):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.look()


class OwnClipping(SeesGradients):
    def configure_gradient_clipping(self, optimizer: Any, **kwargs: Any) -> None:
        self.look()


class StepHooks(SeesGradients):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(self.look)
        return optimizer


class OwnStep(SeesGradients):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)
        self.look()


class StepsAlone(SeesGradients):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        self.look()
        optimizer.step()


class OwnBackward(BeforeStep):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class SeesLoss(BeforeStep):
    def on_before_backward(self, loss: Tensor) -> None:
        assert loss.grad_fn is not None


class OwnOptimizer(BeforeStep):
    """A class that nobody knows, which gets the closure."""

    def configure_optimizers(self) -> Any:
        class Mine(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        return Mine(self.parameters(), lr=0.05)


SEEING = [BeforeStep, AfterStep, OwnClipping, StepHooks, OwnStep, StepsAlone, OwnBackward, SeesLoss, OwnOptimizer]


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "no_length"])
def test_who_looks_sees_the_mean(kind: type[SeesGradients], sized: bool) -> None:
    model, data = kind(), batches(3)
    fitted(model, data if sized else NoLength(data), max_epochs=1, accumulate_grad_batches=4 if sized else 5)
    (seen,) = model.seen
    torch.testing.assert_close(seen, mean_gradient([3, 1, 7]).float())


@pytest.mark.parametrize("clip", [None, 0.05])
def test_under_a_loss_scale(clip: float | None) -> None:
    class Looks(BeforeStep):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.look()

    model = Looks()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    fitted(
        model, batches(3), max_epochs=1, accumulate_grad_batches=3, plugins=plugin, gradient_clip_val=clip,
        gradient_clip_algorithm="value",
    )  # fmt: skip
    before, after = model.seen
    net = network()
    for batch, weight in zip(batches(3), [3, 1, 7], strict=True):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        (loss * 1024.0).backward(torch.tensor(1.0 / (3 * (3 / weight))))
    expected = net[0].weight.grad * (3 / (3 / 3 + 1 / 3 + 7 / 3)) / 1024.0
    assert torch.equal(before, expected)
    assert torch.equal(after, before if clip is None else before.clamp(-clip, clip))


def test_a_last_batch_of_no_weight_still_ends_its_window() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    model = Weighted([3, 1, 0])
    fitted(model, batches(3), max_epochs=1, accumulate_grad_batches=3, plugins=plugin)
    assert not torch.equal(model.net[0].weight, network()[0].weight)


@pytest.mark.parametrize("window", [1, 2])
def test_outputs_hold_what_was_returned(window: int) -> None:
    class Ends(Weighted):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ends.append((outputs["loss"], outputs["weight"], self.loss(batch)))

    ends: list[Any] = []
    fitted(Ends([2, 0.5, 0]), batches(3), max_epochs=1, accumulate_grad_batches=window, limit_train_batches=3)
    assert [weight for _, weight, _ in ends] == [2, 0.5, 0]
    assert all(not loss.requires_grad and loss.dim() == 0 for loss, _, _ in ends)
    first = ends[0][0]
    assert torch.equal(first, Plain().loss(batches(1)[0]).detach()), "whole, not its share"


def test_manual_optimization_returns_what_it_likes() -> None:
    class Manual(Weighted):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
            self.optimizers().zero_grad()
            return {"weight": "heavy"}

    model, other = Manual([]), Weighted([None] * 4)
    for each in (model, other):
        fitted(each, batches(4), max_epochs=1)
    assert_same_bits(model.net, other.net)


def test_short_windows_without_a_length_reach_a_closure() -> None:
    """Without weights: the step of an `optimizer_step` of one's own sees the shorter window's mean as well."""
    own, other = OwnStep(), Weighted([None] * 3)
    own.weights = [None] * 3
    fitted(own, NoLength(batches(3)), max_epochs=1, accumulate_grad_batches=5)
    fitted(other, NoLength(batches(3)), max_epochs=1, accumulate_grad_batches=5)
    torch.testing.assert_close(own.seen[0], mean_gradient([1, 1, 1]).float())
    assert_same_bits(own.net, other.net)


# -- p.grad within a window


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.on_gradients: list[str] = []
        self.gradients: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        self.names.append(name)
        if args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() in self.gradients:
            self.on_gradients.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", [[None] * 6, [2, 1, 3, 4, 1, 2]], ids=["shares", "weights"])
def test_the_first_micro_batch_writes_and_the_others_add(weights: list[Any]) -> None:
    """No gradient is ever filled with zeros: it is None before the first backward, and then that backward's result."""
    operations = Operations()

    class Looks(Weighted):
        def on_after_backward(self) -> None:
            gradients = [p.grad for p in self.parameters()]
            operations.gradients = {g.untyped_storage().data_ptr() for g in gradients}
            if self.trainer.fit_loop.batch_idx % 3 == 0:
                self.first = [g.data_ptr() for g in gradients]
            assert [g.data_ptr() for g in gradients] == self.first

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx % 3 == 0:  # what the last window gathered is released soon, and its memory used anew
                operations.gradients = set()
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss: Tensor) -> None:
            first = self.trainer.fit_loop.batch_idx % 3 == 0
            assert all((p.grad is None) is first for p in self.parameters())

    model = Looks(weights)
    with operations:
        fitted(model, batches(6), max_epochs=1, accumulate_grad_batches=3)
    in_place = {name for name in operations.on_gradients if name.endswith("_")}
    assert in_place == {"aten::add_"}
    assert not [name for name in operations.names if "zero" in name]


def test_a_fit_without_weights_reads_a_plain_loss_at_once() -> None:
    """What runs for a loss that is a tensor is the comparison of its type, and nothing of this room's."""
    made = fitted(Weighted([None] * 4), batches(4), max_epochs=1, accumulate_grad_batches=2)
    binding = made.fit_loop.plans.binding
    assert binding.weights is None
    for plan in binding.placed.values():
        assert plan.backward.__qualname__.startswith("engine_backward")
        assert plan.update in ((), binding.whole.update)
        called: list[str] = []
        with names_called(called):
            plan.losses(torch.ones(()))
        assert called == ["as_it_is"]


@contextlib.contextmanager
def names_called(names: list[str]) -> Iterator[None]:
    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename == window_module.__file__:
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


# -- weights that stay on the device


def test_nobody_waits_for_a_weight_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the CPU in its place, read by nothing: the same sums, as tensors; the step gets one."""
    monkeypatch.setattr(
        window_module, "weight_of", lambda output: torch.tensor(float(output["weight"])) if "weight" in output else None
    )
    by_number, handed = AdoptedOptimizer.step, []

    def step(self: AdoptedOptimizer, grad_scale: float | Tensor = 1.0) -> Any:
        if isinstance(grad_scale, Tensor):
            handed.append(grad_scale)
            Strategy().multiply_gradients(self.optimizer.param_groups[0]["params"], grad_scale)
            grad_scale = 1.0
        return by_number(self, grad_scale)

    monkeypatch.setattr(AdoptedOptimizer, "step", step)
    operations = Operations()
    model = Weighted(WEIGHTS)
    with operations:
        fitted(model, batches(11), max_epochs=2, accumulate_grad_batches=4)
    assert len(handed) == 6 and all(factor.shape == () for factor in handed)
    assert "aten::_local_scalar_dense" not in operations.names
    expected = by_hand(OPTIMIZERS["sgd"], lambda p: None, 4, WEIGHTS, 2, torch.float64)
    torch.testing.assert_close(model.net.double().state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_negative_weight_on_the_device_is_no_number() -> None:
    weight = window_module.weight_of({"weight": torch.ones((), device="meta", dtype=torch.int64)})
    assert isinstance(weight, Tensor) and weight.device.type == "meta" and weight.dtype is torch.float32
    weights = window_module.WindowWeights()
    nothing, some = torch.tensor(0.0), torch.tensor(4.0)
    assert weights.add(nothing, 2) == math.inf and weights.add(some, 2) == 0.5
    assert weights.factor() == 0.5
    weights.begin()
    weights.add(nothing, 2)
    assert weights.factor() == 1.0


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6) | st.integers(0, 2**40), min_size=1, max_size=20), st.booleans())
def test_shares_and_factor_make_the_weights(given_weights: list[float], twice: bool) -> None:
    """In numbers: each share times the factor is the weight's part of the sum, also of what is gathered afterwards."""
    weights = window_module.WindowWeights()
    kept = [float(weight) for weight in given_weights if weight]
    gradient = torch.zeros(len(kept), dtype=torch.float64, requires_grad=True)
    gradient.grad = torch.zeros(len(kept), dtype=torch.float64)
    multiply = partial(Strategy().multiply_gradients, [gradient])
    for at, weight in enumerate(kept):
        gradient.grad[at] += 1.0 / weights.add(weight, len(given_weights))
        if twice and at == len(kept) // 2:
            weights.average(multiply)
    weights.average(multiply)
    expected = torch.tensor(kept, dtype=torch.float64)
    torch.testing.assert_close(gradient.grad, expected / expected.sum(), rtol=1e-13, atol=0.0)
    assert weights.factor() == pytest.approx(1.0, rel=1e-14)


# -- saved inside a window


@pytest.mark.parametrize("weights", [WEIGHTS, [torch.tensor(w) for w in WEIGHTS]], ids=["numbers", "tensors"])
def test_resumed_inside_a_window(weights: list[Any], tmp_path: Path) -> None:
    class Saves(Weighted):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    whole, resumed = Saves(weights, OPTIMIZERS["adamw"]), Weighted(weights, OPTIMIZERS["adamw"])
    fitted(whole, batches(11), max_epochs=1, accumulate_grad_batches=4)
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["lit_fast"]["weights"]
    assert saved == {"length": 4, "reference": 5.0, "total": (5 + 2 + 9) / 5}
    made = lit_fast.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made.fit(resumed, batches(11), ckpt_path=tmp_path / "inside.ckpt")
    assert_same_bits(whole, resumed)
