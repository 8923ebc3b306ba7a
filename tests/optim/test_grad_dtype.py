"""Gradients of 16-bit parameters that are kept and summed in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, network, trainer
from torch import Tensor, nn

from lit_fast import optim
from lit_fast.errors import MisconfigurationException
from lit_fast.optim import adopt, grad_dtype
from lit_fast.optim.grad_dtype import keep_gradients_in

pytestmark = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
WINDOW = 8
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),  # no kernel
}


class Ours(Plain):
    """Weights of its micro-batches, where there are any; and the gradients before each step."""

    def __init__(self, optimizer: Any = None, weights: list[float] | None = None) -> None:
        super().__init__(optimizer)
        self.weights = weights
        self.before_step: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch).float()  # shares of the window, too, are then in float32
        return loss if self.weights is None else {"loss": loss, "weight": self.weights[batch_idx]}


class Watched(Ours):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.before_step.append([p.grad.clone() for p in self.parameters()])


def micro_gradients(net: nn.Module, data: list[Tensor], shares: list[float]) -> list[list[Tensor]]:
    """The 16-bit gradients of each micro-batch by itself, by parameter."""
    found = []
    for batch, share in zip(data, shares, strict=True):
        loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean().float()
        found.append(torch.autograd.grad(loss, list(net.parameters()), torch.tensor(share)))
    return [list(gradients) for gradients in zip(*found, strict=True)]


def in_order(gradients: list[Tensor], dtype: torch.dtype) -> Tensor:
    total = gradients[0].to(dtype)
    for gradient in gradients[1:]:
        total = total + gradient.to(dtype)
    return total


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 7.0, 2.0, 2.0, 5.0, 1.0, 9.0]], ids=["shares", "weights"])
def test_a_window_is_summed_in_float32(precision: str, weights: list[float] | None) -> None:
    dtype = DTYPES[precision]
    data = [batch.to(dtype) for batch in batches(WINDOW)]
    shares = [1 / WINDOW] * WINDOW if weights is None else [1 / (WINDOW * (weights[0] / w)) for w in weights]
    factor = 1.0 if weights is None else WINDOW / sum(w / weights[0] for w in weights)
    gradients = micro_gradients(network().to(dtype), data, shares)
    wide, narrow = Watched(weights=weights), Watched(weights=weights)
    fitted(wide, data, max_epochs=1, accumulate_grad_batches=WINDOW, precision=precision, grad_dtype="float32")
    fitted(narrow, data, max_epochs=1, accumulate_grad_batches=WINDOW, precision=precision)
    errors = []
    for seen, short, each in zip(wide.before_step[0], narrow.before_step[0], gradients, strict=True):
        assert seen.dtype is torch.float32 and short.dtype is dtype
        assert torch.equal(seen, in_order(each, torch.float32) * factor)
        exact = sum(gradient.double() for gradient in each) * factor
        bound = WINDOW * torch.finfo(torch.float32).eps * factor * sum(gradient.double().abs() for gradient in each)
        assert ((seen - exact).abs() <= bound).all()
        errors.append((short - exact).abs().max() / bound.max())
    assert max(errors) > 1.0, "16 bits are not as good, so the test would notice"


@pytest.mark.parametrize("precision", DTYPES)
def test_the_compiled_step_reads_the_float32_sum(precision: str) -> None:
    """A first SGD step's buffer is the gradient, its master the weight: both as float64 has them but for float32's
    roundings, and closer than what sums of 16 bits give."""
    dtype = DTYPES[precision]
    data = [batch.to(dtype) for batch in batches(WINDOW)]
    gradients = micro_gradients(network().to(dtype), data, [1 / WINDOW] * WINDOW)
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "state_dtype": "float32", "master": "float32"}
    runs = {}
    for wide in ("float32", None):
        model = Ours(lambda p: optim.SGD(p, **options))
        made = fitted(
            model, data, max_epochs=1, accumulate_grad_batches=WINDOW, precision=precision, grad_dtype=wide
        )  # fmt: skip
        assert "read as they are" in made.explain() or not wide
        runs[wide] = [made.optimizers[0].state[p] for p in model.parameters()]
    errors = []
    for before, each, state, narrow in zip(
        network().to(dtype).parameters(), gradients, runs["float32"], runs[None], strict=True
    ):
        exact = sum(gradient.double() for gradient in each)
        bound = WINDOW * torch.finfo(torch.float32).eps * sum(gradient.double().abs() for gradient in each)
        weight = before.detach().double() - 0.5 * exact
        last_rounding = torch.finfo(torch.float32).eps * weight.abs()
        assert ((state["momentum_buffer"] - exact).abs() <= bound).all()
        assert ((state["master"] - weight).abs() <= 0.5 * bound + last_rounding).all()
        for key, value, limit in (("momentum_buffer", exact, bound), ("master", weight, 0.5 * bound + last_rounding)):
            errors.append(((narrow[key] - value).abs() / limit).max())
    assert min(errors[:2]) > 100.0, "sums of 16 bits are far worse, so the test would notice"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 7.0, 2.0]], ids=["shares", "weights"])
def test_steps_take_the_sum(optimizer: str, watched: bool, weights: Any) -> None:
    """By hand: sums in float32, read by compiled steps as they are, by torch's own cast; a window's factor before."""
    make, data = OPTIMIZERS[optimizer], [batch.bfloat16() for batch in batches(4)]
    shares = [0.5] * 4 if weights is None else [1 / (2 * (weights[at - at % 2] / weights[at])) for at in range(4)]
    net = network().bfloat16()
    adopted = adopt(make(net.parameters()))
    assert adopted.compiled is (optimizer != "nadam")
    if adopted.compiled:
        keep_gradients_in(torch.float32, net.parameters())
    for begin in (0, 2):
        factor = 1.0 if weights is None else 2 / (1 + weights[begin + 1] / weights[begin])
        gradients = micro_gradients(net, data[begin : begin + 2], shares[begin : begin + 2])
        in_memory = watched or not adopted.compiled
        for parameter, each in zip(net.parameters(), gradients, strict=True):
            total = in_order(each, torch.float32) * (factor if in_memory else 1.0)
            parameter.grad = total if adopted.compiled else total.bfloat16()
        adopted.step(grad_scale=1.0 if in_memory else factor)
    model = (Watched if watched else Ours)(make, weights)
    made = fitted(model, data, max_epochs=1, accumulate_grad_batches=2, precision="bf16-true", grad_dtype=torch.float32)
    for mine, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
        assert mine.dtype is torch.bfloat16 and torch.equal(mine, theirs)
    assert ("compiled step" in made.explain()) is adopted.compiled
    assert ("read as they are" in made.explain()) is adopted.compiled
    assert ("cast to their parameters' dtype" in made.explain()) is not adopted.compiled


@pytest.mark.parametrize("how", ["norm", "value"])
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("optimizer", ["sgd", "nadam"])
def test_clipped(how: str, watched: bool, optimizer: str) -> None:
    """The float32 sum is clipped, whoever steps."""
    data, limit = [batch.bfloat16() for batch in batches(4)], {"norm": 0.25, "value": 0.0625}[how]
    net = network().bfloat16()
    adopted = adopt(OPTIMIZERS[optimizer](net.parameters()))
    if adopted.compiled:
        keep_gradients_in(torch.float32, net.parameters())
    sums = [in_order(each, torch.float32) for each in micro_gradients(net, data, [0.25] * 4)]
    norm = torch.nn.utils.get_total_norm(sums)
    coefficient = (limit / (norm + 1e-6)).item()
    for parameter, total in zip(net.parameters(), sums, strict=True):
        clipped = total * coefficient if how == "norm" else total.clamp(-limit, limit)
        parameter.grad = clipped if adopted.compiled else clipped.bfloat16()
    adopted.step()
    model = (Watched if watched else Ours)(OPTIMIZERS[optimizer])
    if watched:
        model.on_train_batch_end = lambda *args: None  # looks after clipping
    fitted(
        model, data, max_epochs=1, accumulate_grad_batches=4, precision="bf16-true", grad_dtype="float32",
        gradient_clip_val=limit, gradient_clip_algorithm=how,
    )  # fmt: skip
    assert norm > limit
    for mine, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_hooks_of_a_step_see_the_dtype_that_it_reads() -> None:
    """Of a compiled step float32, of torch's own the parameter's; and float32 again afterwards."""
    for name, dtype in (("adamw", torch.float32), ("nadam", torch.bfloat16)):
        model, seen = Ours(OPTIMIZERS[name]), []
        model.on_train_batch_end = lambda *_, m=model: m.before_step.append([p.grad for p in m.parameters()])

        def configure(model: Any = model, seen: list[Any] = seen, name: str = name) -> Any:
            optimizer = OPTIMIZERS[name](model.parameters())
            look = lambda o, *_: seen.extend(p.grad.dtype for g in o.param_groups for p in g["params"])  # noqa: E731
            optimizer.register_step_pre_hook(look)
            optimizer.register_step_post_hook(look)
            return optimizer

        model.configure_optimizers = configure
        fitted(model, [batches(1)[0].bfloat16()], max_epochs=1, precision="bf16-true", grad_dtype="float32")
        assert set(seen) == {dtype} and len(seen) == 2 * len(list(model.parameters()))
        assert {gradient.dtype for gradient in model.before_step[0]} == {torch.float32}


def test_a_compiled_step_that_gives_up_casts() -> None:
    """A gradient that no kernel reads comes in the second step."""

    class Late(Ours):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 1:
                weight = self.net[0].weight
                weight.grad = weight.grad.repeat(1, 2)[:, ::2]
                assert weight.grad.dtype is torch.float32

    model = Late(OPTIMIZERS["adam_foreach"])
    with pytest.warns(UserWarning, match="its own step"):
        made = fitted(model, [b.bfloat16() for b in batches(2)], max_epochs=1, precision="bf16-true",
                      grad_dtype="float32")  # fmt: skip
    assert {int(state["step"]) for state in made.optimizers[0].state.values()} == {2}


@pytest.mark.parametrize("window", [1, 2])
def test_full_precision_is_left_alone(window: int) -> None:
    one, other = Ours(), Ours()
    fitted(one, batches(4), max_epochs=1, accumulate_grad_batches=window, grad_dtype="float32")
    fitted(other, batches(4), max_epochs=1, accumulate_grad_batches=window)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_of_ones_own_and_manual_optimization() -> None:
    """Optimizers that are called with the closure cannot take two dtypes either."""

    class Mine(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Manual(Watched):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    data = [batch.bfloat16() for batch in batches(4)]
    own, manual = Watched(lambda p: Mine(p, lr=0.01)), Manual(lambda p: torch.optim.Adam(p, lr=0.01))
    fitted(own, data, max_epochs=1, accumulate_grad_batches=2, precision="bf16-true", grad_dtype="float32")
    fitted(manual, data, max_epochs=1, precision="bf16-true", grad_dtype="float32")
    for model in (own, manual):
        assert len(model.before_step) == 2
        assert all(gradient.dtype is torch.float32 for step in model.before_step for gradient in step)
        assert not torch.equal(model.net[0].weight, network()[0].weight.bfloat16())


def test_each_use_of_a_weight_and_every_hook() -> None:
    """What torch does, and the manual says: cast before hooks, and before the uses within one backward are summed."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    keep_gradients_in(torch.float32, [weight])
    seen: list[torch.dtype] = []
    weight.register_hook(lambda gradient: seen.append(gradient.dtype))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    small = torch.tensor(2.0**-10, dtype=torch.bfloat16)
    (weight * 1.0 + weight * small).sum().backward()
    assert weight.grad.item() == 1.0 + 2.0**-10
    assert seen == [torch.float32, torch.float32]


def test_an_embedding_with_sparse_gradients() -> None:
    class Rows(Watched):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.5))
            self.net = nn.Embedding(4, 2, sparse=True)
            nn.init.ones_(self.net.weight)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.net(batch).float().sum(), "weight": 1 + batch_idx}

    model = Rows()
    with pytest.warns(UserWarning, match="its own step"):
        fitted(model, [torch.tensor([1]), torch.tensor([1, 2])], max_epochs=1, accumulate_grad_batches=2,
               precision="bf16-true", grad_dtype="float32")  # fmt: skip
    (gradient,) = model.before_step[0]
    assert gradient.is_sparse and gradient.dtype is torch.float32
    torch.testing.assert_close(gradient.to_dense()[:, 0], torch.tensor([0.0, 1.0, 2 / 3, 0.0]))
    stepped = torch.ones(4, dtype=torch.bfloat16).add(gradient.to_dense()[:, 0].bfloat16(), alpha=-0.5)
    assert torch.equal(model.net.weight[:, 0], stepped)


# -- before and after


def test_afterwards_the_parameters_are_as_before() -> None:
    class Fails(Ours):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    for model in (Ours(), Fails()):
        model.bfloat16()
        model.net[0].weight.grad = torch.ones_like(model.net[0].weight)  # of a loop before
        try:
            fitted(model, batches(4), max_epochs=1, accumulate_grad_batches=4, precision="bf16-true",
                   grad_dtype="float32")  # fmt: skip
        except RuntimeError as error:
            assert "stop here" in str(error)
        for parameter in model.parameters():
            assert parameter.grad_dtype is parameter.grad.dtype is torch.bfloat16


def test_undone_to_what_was_there() -> None:
    parameters = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    parameters[1].grad_dtype = None
    undo = keep_gradients_in(torch.float32, parameters)
    assert all(p.grad_dtype is torch.float32 for p in parameters)
    undo()
    assert [p.grad_dtype for p in parameters] == [torch.bfloat16, None, torch.float32]


@pytest.mark.parametrize("to_wide", [True, False])
def test_resumed_inside_a_window(to_wide: bool, tmp_path: Path) -> None:
    class Saves(Ours):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 4, "precision": "bf16-true"}
    whole, resumed = Saves(), Saves()
    fitted(whole, batches(8), grad_dtype="float32", **options)
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["lit_fast"]["gradients"]
    assert {gradient.dtype for gradient in saved.values()} == {torch.float32}
    made = trainer(grad_dtype="float32" if to_wide else None, **options)
    made.fit(resumed, batches(8), ckpt_path=tmp_path / "inside.ckpt")
    assert made.global_step == 2
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert same is to_wide


@pytest.mark.parametrize("given", ["float64", torch.bfloat16, True, 32])
def test_other_dtypes_are_refused(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match="grad_dtype="):
        fitted(Ours(), batches(1), max_epochs=1, grad_dtype=given)


def test_a_torch_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_dtype, "Tensor", object)
    with pytest.raises(MisconfigurationException, match="newer torch"):
        fitted(Ours(), batches(1), max_epochs=1, grad_dtype="float32")
