"""Steps under a loss scale, in loops by hand, against `torch.amp.GradScaler` with torch's own steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cuda_stand_in import StandIn, no_waiting, stand_in_for_cuda
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import lit_fast.optim as ours
from lit_fast.errors import MisconfigurationException
from lit_fast.optim import adopt, scaling
from lit_fast.optim.scaling import LossScale

INF, NAN = float("inf"), float("nan")
STEPS = [None, INF, None, None, None, NAN, None, -INF, None, None, None, None]  # what one gradient holds in each step

MAKERS: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "dampened": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "no kernel": lambda ps: torch.optim.NAdam(ps, lr=0.1),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_cuda(monkeypatch)


def scaler(init_scale: float = 2.0**16, growth_interval: int = 3) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    made.scale(torch.zeros(()))  # its state is made by the first loss
    return made


def parameters(seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(size, generator=generator).to(dtype)) for size in ((300,), (4, 5), ())]


def set_gradients(params: list[Parameter], step: int, scale: float, bad: float | None = None) -> None:
    """Of a loss times `scale`."""
    for p, values in zip(params, parameters(100 + step), strict=True):
        p.grad = (values.detach() * scale).to(p.dtype)
    if bad is not None:
        params[1].grad[2, 3] = bad  # type: ignore[index]


def loop(
    make: Callable[[list[Parameter]], torch.optim.Optimizer],
    take: Callable[[torch.amp.GradScaler, torch.optim.Optimizer], Callable[[], Any]],
    init_scale: float = 2.0**16,
) -> tuple[list[Tensor], list[dict[str, Any]], torch.optim.Optimizer]:
    """Parameters, the scaler's state after each of `STEPS`, and the optimizer."""
    params, own = parameters(), scaler(init_scale)
    optimizer = make(params)
    step, states = take(own, optimizer), []
    for number, bad in enumerate(STEPS):
        set_gradients(params, number, own.get_scale(), bad)
        step()
        own.update()
        states.append(own.state_dict())
    return [p.detach() for p in params], states, optimizer


def of_torch(clip: Callable[[Any], Any] | None = None, hook: bool = False) -> Any:
    def bind(own: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            own.unscale_(optimizer)
            if clip is not None:
                clip(optimizer.param_groups[0]["params"])
            own.step(optimizer)

        return step

    return bind


def of_ours(unscale: bool = False, **options: Any) -> Any:
    def bind(own: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        adopted = adopt(optimizer, scaler=own, **options)

        def step() -> None:
            if unscale:
                own.unscale_(optimizer)
            adopted.step()

        return step

    return bind


def assert_same_loops(mine: Any, theirs: Any) -> None:
    assert mine[1] == theirs[1], "the scaler's keys and values"
    assert all(map(torch.equal, mine[0], theirs[0]))
    for entry, expected in zip(mine[2].state.values(), theirs[2].state.values(), strict=True):
        assert entry.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(entry[key]), torch.as_tensor(expected[key])) for key in entry)


@pytest.mark.parametrize("init_scale", [2.0**16, 1000.0, 3.0 / 1024.0])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("limit", [None, 0.25], ids=["plain", "value"])
@pytest.mark.parametrize("kind", MAKERS)
def test_bit_equal_with_torch(kind: str, limit: float | None, unscale: bool, init_scale: float) -> None:
    """Whatever the scale is. Growth, backoff and their counter move with it."""
    clip = None if limit is None else lambda params: clip_grad_value_(params, limit)
    theirs = loop(MAKERS[kind], of_torch(clip), init_scale)
    mine = loop(MAKERS[kind], of_ours(unscale, clip_value=limit), init_scale)
    assert_same_loops(mine, theirs)
    assert {state["scale"] / init_scale for state in mine[1]} == {0.5, 1.0, 0.25}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("limit", [None, 0.25], ids=["plain", "value"])
@pytest.mark.parametrize("kind", MAKERS)
def test_bit_equal_where_the_device_decides(kind: str, limit: float | None, unscale: bool) -> None:
    clip = None if limit is None else lambda params: clip_grad_value_(params, limit)
    mine = loop(MAKERS[kind], of_ours(unscale, clip_value=limit))
    assert_same_loops(mine, loop(MAKERS[kind], of_torch(clip)))


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("kind", ["adamw", "dampened"])
def test_what_was_seen_between_decides_on_nothing(kind: str, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where hooks look under the Trainer. Clipped by value, an infinite gradient has become a number."""
    if on_device:
        stand_in_for_cuda(monkeypatch)

    def watched(own: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        adopted = adopt(optimizer)
        loss_scale = LossScale(own, adopted)
        loss_scale.told = True
        if on_device:
            adopted.set_guard(loss_scale)

        def step() -> None:
            own.unscale_(optimizer)
            clip_grad_value_(optimizer.param_groups[0]["params"], 0.25)
            loss_scale.step(adopted.step)

        return step

    assert_same_loops(
        loop(MAKERS[kind], watched), loop(MAKERS[kind], of_torch(lambda params: clip_grad_value_(params, 0.25)))
    )


@pytest.mark.parametrize("options", [{"norm_type": INF}, {"norm_type": 1.0}, {"per_group": True}], ids=str)
def test_clipped_by_other_norms(options: Any) -> None:
    """The norm is that of the unscaled gradients, and steps with a gradient that is no number are left out."""
    plain = loop(MAKERS["momentum"], of_ours(max_norm=0.5, **options))
    with_numbers = parameters()
    adopted = adopt(MAKERS["momentum"](with_numbers), max_norm=0.5, **options)
    for number, bad in enumerate(STEPS):
        set_gradients(with_numbers, number, 1.0)
        if bad is None:
            adopted.step()
    assert all(map(torch.equal, plain[0], with_numbers))


@pytest.mark.parametrize("kind", MAKERS)
def test_where_no_kernel_can_leave_a_step_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler unscales, and the host waits to hear what it has found."""
    monkeypatch.setattr(scaling, "kernels_for", lambda device: ("", "there are no kernels for the device"))
    assert_same_loops(loop(MAKERS[kind], of_ours()), loop(MAKERS[kind], of_torch()))


def test_muon() -> None:
    results = []
    for bad_steps in (True, False):
        own, params = scaler(), parameters()
        adopted = adopt(ours.Muon(params, lr=0.1), scaler=own)
        assert adopted.compiled
        for number, bad in enumerate(STEPS):
            set_gradients(params, number, own.get_scale(), bad)
            if bad is None or bad_steps:
                adopted.step()
                own.update()
        results.append(params)
    assert all(map(torch.equal, *results))


def test_a_resumed_loop_is_the_uninterrupted_one() -> None:
    """With a checkpoint behind every step: of the scaler and of the optimizer, as torch's loops save them."""
    params, own, saved = parameters(), scaler(), None
    for number, bad in enumerate(STEPS):
        own = torch.amp.GradScaler("cpu", growth_interval=3)
        if saved is not None:
            own.load_state_dict(saved[0])
        own.scale(torch.zeros(()))
        optimizer = MAKERS["adamw"](params)
        adopted = adopt(optimizer, scaler=own)
        if saved is not None:
            optimizer.load_state_dict(saved[1])
        set_gradients(params, number, own.get_scale(), bad)
        adopted.step()
        own.update()
        saved = own.state_dict(), optimizer.state_dict()
    straight = loop(MAKERS["adamw"], of_ours())
    assert own.state_dict() == straight[1][-1]
    assert all(map(torch.equal, params, straight[0]))


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("init_scale", [2.0**16, 1000.0])
def test_clipped_by_norm(init_scale: float, unscale: bool) -> None:
    """Within what torch's norm, summed in float32, and one rounding for two may differ by."""
    make = lambda ps: torch.optim.SGD(ps, lr=0.1)  # noqa: E731
    theirs = loop(make, of_torch(lambda params: clip_grad_norm_(params, 0.5)), init_scale)
    mine = loop(make, of_ours(unscale, max_norm=0.5), init_scale)
    assert mine[1] == theirs[1]
    steps = sum(bad is None for bad in STEPS)
    for a, b in zip(mine[0], theirs[0], strict=True):
        # A step is at most lr * max_norm = 0.05, its coefficient within 325 * 2^-24: 321 squares, 2 products
        bound = steps * (0.05 * 325 * 2.0**-24 + a.abs().max().item() * 2.0**-23)
        assert (a - b).abs().max().item() <= bound


def test_one_product_of_both_factors_differs_from_two_by_four_roundings_at_most() -> None:
    """With a scale that is no power of two: torch rounds behind each of two factors, we behind their product."""
    weight = Parameter(torch.zeros(1000))
    gradient = parameters(3)[0].detach().repeat(4)[:1000]
    after = []
    for ours_steps in (True, False):
        own, p = scaler(1000.0), Parameter(weight.detach().clone())
        p.grad = gradient * 1000.0
        optimizer = torch.optim.SGD([p], lr=1.0)
        if ours_steps:
            norm = adopt(optimizer, max_norm=1.0, scaler=own).step()
            assert norm is not None
        else:
            own.unscale_(optimizer)
            p.grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
            own.step(optimizer)
        after.append(p.detach().double())
    mine, theirs = after
    assert ((mine - theirs).abs() <= theirs.abs() * 4.001 * 2.0**-24).all() and not torch.equal(mine, theirs)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_gradients_stay_scaled_and_the_norm_is_unscaled(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        stand_in_for_cuda(monkeypatch)
    params, own = parameters(), scaler()
    adopted = adopt(torch.optim.AdamW(params), max_norm=1.0, scaler=own)
    assert adopted.compiled
    set_gradients(params, 0, own.get_scale())
    before = [p.grad.clone() for p in params]
    norm = adopted.step(grad_scale=0.5)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    exact = 0.5 * torch.cat([g.double().flatten() / 2**16 for g in before]).norm().item()
    assert norm is not None and abs(norm.item() / exact - 1.0) < 1e-6
    set_gradients(params, 1, own.get_scale(), NAN)
    own.update()
    adopted.step()
    assert adopted.skipped_steps == 1


def test_several_optimizers_share_a_scaler() -> None:
    """One infinite gradient lowers the scale once, and leaves out the step of its own optimizer alone."""
    results = []
    for ours_step in (True, False):
        own, params = scaler(), parameters()
        optimizers = [torch.optim.AdamW(params[:1], lr=0.1, fused=True), torch.optim.SGD(params[1:], lr=0.1)]
        steps = [adopt(each, scaler=own).step if ours_step else partial(own.step, each) for each in optimizers]
        states = []
        for number, bad in enumerate(STEPS):
            set_gradients(params, number, own.get_scale(), bad)
            for step in steps:
                step()
            own.update()
            states.append(own.state_dict())
        results.append((params, states))
    assert results[0][1] == results[1][1]
    assert all(map(torch.equal, results[0][0], results[1][0]))


def test_what_the_scaler_refuses() -> None:
    own, params = scaler(), parameters()
    adopted = adopt(torch.optim.SGD(params, lr=0.1), scaler=own)
    with pytest.raises(AssertionError, match="No inf checks"):  # there is no gradient
        adopted.step()
    own.update(1.0)
    set_gradients(params, 0, 1.0)
    adopted.step()
    with pytest.raises(RuntimeError, match="already been called"):
        adopted.step()
    with pytest.raises(AssertionError, match="_scale is None"):
        adopt(torch.optim.SGD(params, lr=0.1), scaler=torch.amp.GradScaler("cpu")).step()


def test_bad_options() -> None:
    class Counts(torch.amp.GradScaler):
        def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            return super().step(optimizer, *args, **kwargs)

    replaced = scaler()
    replaced.update = lambda: None  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    for other in (Counts("cpu"), torch.amp.GradScaler("cpu", enabled=False), replaced):
        with pytest.raises(MisconfigurationException, match="Leave scaler out"):
            adopt(optimizer, scaler=other)
    with pytest.raises(MisconfigurationException, match="Leave nonfinite out"):
        adopt(optimizer, nonfinite="skip", scaler=scaler())


def test_float16_parameters() -> None:
    """torch unscales no float16 gradients but for a fused step."""
    params, own = parameters(dtype=torch.float16), scaler(1024.0)
    adopted = adopt(torch.optim.AdamW(params, lr=0.125, eps=1e-12), scaler=own, master="float32")
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0, 1024.0, INF)
    adopted.step()
    own.update()
    assert all(map(torch.equal, params, before)) and own.get_scale() == 512.0
    set_gradients(params, 1, 512.0)
    adopted.step()
    for p, old in zip(params, before, strict=True):  # Adam's first step has the size of the learning rate
        exact = old.double() * (1.0 - 0.125 * 1e-2) - 0.125 * p.grad.double().sign()  # type: ignore[union-attr]
        torch.testing.assert_close(p.double(), exact, rtol=2.0**-11, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
def test_step_hooks_see_unscaled_gradients_and_no_step_that_is_left_out(unscale: bool) -> None:
    seen: list[float] = []

    def make(params: list[Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params, lr=0.1, fused=False)
        optimizer.register_step_pre_hook(lambda *_: seen.append(params[0].grad[0].item()))  # type: ignore[index]
        return optimizer

    loop(make, of_ours(unscale))
    assert seen == [parameters(100 + step)[0][0].item() for step, bad in enumerate(STEPS) if bad is None]


# ---- lit_fast's own optimizers, in a loop that stays as it is ----

OWN: dict[str, tuple[Any, Any]] = {
    "adamw": (lambda ps: ours.AdamW(ps, lr=0.1), lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True)),
    "dampened": (
        lambda ps: ours.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    ),
}


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("kind", OWN)
def test_own_optimizers(kind: str, unscale: bool, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        stand_in_for_cuda(monkeypatch)

    def take(own: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        assert optimizer._step_supports_amp_scaling is on_device  # type: ignore[attr-defined]

        def step() -> None:
            if unscale:
                own.unscale_(optimizer)
            own.step(optimizer)

        return step

    mine, theirs = OWN[kind]
    assert_same_loops(loop(mine, take), loop(theirs, of_torch()))


@pytest.mark.usefixtures("cuda")
def test_own_optimizers_whose_gradients_have_no_kernel() -> None:
    results = []
    warns = pytest.warns(UserWarning, match="torch's own step runs")
    for make, says in zip(OWN["adamw"], (warns, contextlib.nullcontext()), strict=True):
        params, own = [Parameter(torch.ones(3, dtype=torch.float64))], scaler()
        optimizer = make(params)
        with says:
            for bad in (1.0, INF, 2.0):
                params[0].grad = torch.tensor([bad, 1.0, -2.0], dtype=torch.float64) * own.get_scale()
                own.step(optimizer)
                own.update()
        results.append((params[0].detach(), own.state_dict()))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0.0)


@pytest.mark.usefixtures("cuda")
def test_own_optimizers_without_gradients() -> None:
    """As torch's fused ones: there is nothing to step, and nothing to move the scale by."""
    own, params = scaler(), parameters()
    before = [p.detach().clone() for p in params]
    own.step(ours.AdamW(params))
    assert all(map(torch.equal, params, before))
    with pytest.raises(AssertionError, match="No inf checks"):
        own.update()


def test_own_optimizers_with_hooks_are_unscaled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_cuda(monkeypatch)
    optimizer = ours.AdamW(parameters())
    assert optimizer._step_supports_amp_scaling
    optimizer.register_step_post_hook(lambda *_: None)
    assert not optimizer._step_supports_amp_scaling


# ---- who waits ----


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("limits", [{}, {"max_norm": 1.0}, {"clip_value": 1.0}], ids=["plain", "norm", "value"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("who", ["adopted", "own"])
def test_nothing_on_the_way_waits_for_the_device(
    who: str, unscale: bool, limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that do nothing: the stand-in reads tensors on the host."""
    monkeypatch.setattr(StandIn, "step_on_cuda", lambda self, groups, state, scale, *_: None if scale == 1.0 else "?")
    params, own = parameters(), scaler()
    if who == "own":
        optimizer: torch.optim.Optimizer = ours.AdamW(params)
        step: Callable[[], Any] = lambda: own.step(optimizer)  # noqa: E731
    else:
        optimizer = MAKERS["adamw"](params)
        step = adopt(optimizer, scaler=own, **limits).step
    set_gradients(params, 0, 2.0**16)
    with monkeypatch.context() as patch:
        no_waiting(patch)
        for _ in range(2):
            if unscale:
                own.unscale_(optimizer)
            step()
            own.update()
    assert own.state_dict()["_growth_tracker"] == 2
