"""16-mixed: the scaled loss, skipped steps, hooks and clipping, against a loop written with `torch.amp.GradScaler`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, network
from torch import Tensor

import lit_fast
from lit_fast.errors import MisconfigurationException
from lit_fast.precision import MixedPrecision


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 5, **options})


def float16(**options: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler(**options))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def by_hand(data: list[Tensor], steps: int, make: Any, window: int = 1, clip: Any = None, **options: Any) -> Any:
    """Losses, weights and the scaler after `steps` micro-batches of a loop as torch's documentation writes it."""
    net, own = network(), scaler(**options)
    optimizer, losses = make(net.parameters()), []
    for index in range(steps):
        batch = data[index % len(data)]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        losses.append(loss.item())
        if index % window == 0:
            optimizer.zero_grad()
        own.scale(loss / window).backward()
        if index % window == window - 1:
            own.unscale_(optimizer)
            if clip is not None:
                clip(net.parameters())
            own.step(optimizer)
            own.update()
    return losses, net, own


SPIKE = [*batches(9), torch.full((4, 8), 1e4)]  # the last batch of ten overflows float16: its step is skipped


class Watches(lit_fast.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None: ...
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None: ...


CLIPPING: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, None),
    "value": (
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        lambda params: torch.nn.utils.clip_grad_value_(params, 0.1),
    ),
    "norm": ({"gradient_clip_val": 2.0}, lambda params: torch.nn.utils.clip_grad_norm_(params, 2.0)),
}


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("how", CLIPPING)
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
def test_bit_equal_with_the_loop_by_hand(window: int, how: str, watched: bool) -> None:
    model, plugin, (options, clip) = Plain(adamw), float16(growth_interval=3), CLIPPING[how]
    made = fitted(
        model, SPIKE, max_epochs=3, plugins=plugin, accumulate_grad_batches=window,
        callbacks=[Watches()] if watched else [], **options,
    )  # fmt: skip
    losses, net, own = by_hand(SPIKE, 30, adamw, window, clip, growth_interval=3)
    assert str(model.losses) == str(losses)  # as text, since the overflowed losses are not numbers
    for ours, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert plugin.scaler is not None and plugin.scaler.state_dict() == own.state_dict()
    assert made.scaler is plugin.scaler
    assert made.global_step == 30 // window, "skipped steps count, as in Lightning"


@pytest.mark.parametrize("how", ["plain", "value"])
def test_bit_equal_where_the_scale_is_no_power_of_two(how: str) -> None:
    model, plugin, (options, clip) = Plain(adamw), float16(init_scale=1000.0), CLIPPING[how]
    fitted(model, SPIKE, max_epochs=3, plugins=plugin, **options)
    losses, _, own = by_hand(SPIKE, 30, adamw, 1, clip, init_scale=1000.0)
    assert str(model.losses) == str(losses)
    assert plugin.scaler is not None and plugin.scaler.state_dict() == own.state_dict()


class Skips(Watches):
    """Looks at no gradient, and says so."""

    reads_gradients = False


@pytest.mark.parametrize("how", CLIPPING)
@pytest.mark.parametrize("callback", [None, Skips, Watches])
def test_the_step_unscales_unless_somebody_looks(how: str, callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no pass over the gradients before it, and they stay scaled and unclipped in memory."""
    passes: list[object] = []
    unscale = torch._amp_foreach_non_finite_check_and_unscale_

    def counted(*args: Any) -> None:
        passes.append(args)
        unscale(*args)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counted)
    model = Plain(adamw)
    made = fitted(
        model, batches(1), max_epochs=1, plugins=float16(), callbacks=[] if callback is None else [callback()],
        **CLIPPING[how][0],
    )  # fmt: skip
    watched = callback is Watches
    assert bool(passes) is watched
    said = "in memory: something can see them" if watched else "in registers, by the step"
    assert f"gradients unscaled {said}" in made.explain()
    net = network()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (net(batches(1)[0]).squeeze(-1) - batches(1)[0].sum(-1)).square().mean()
    (loss * 1024.0).backward()
    if watched:
        for p in net.parameters():
            p.grad /= 1024.0  # type: ignore[operator]
        if CLIPPING[how][1] is not None:
            CLIPPING[how][1](net.parameters())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.net.parameters(), net.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("how", CLIPPING)
def test_one_bad_gradient_at_chosen_steps(how: str, bad: float) -> None:
    """Parameters, moments and counters of steps are as if the batch had not been there."""

    class Poisoned(Plain):
        poisoned: tuple[int, ...] = ()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + self.net[2].bias.sum() * bad if batch_idx in self.poisoned else loss

    options, states = CLIPPING[how][0], []
    for poisoned in ((1, 4, 5), ()):
        model, plugin = Poisoned(adamw), float16(growth_interval=3)
        model.poisoned = poisoned
        data = batches(11) if poisoned else [batch for i, batch in enumerate(batches(11)) if i not in (1, 4, 5)]
        made = fitted(model, data, max_epochs=1, plugins=plugin, **options)
        states.append([model.state_dict(), made.optimizers[0].state_dict()])
        # One good step, a bad one, two good ones, two bad ones, five good ones, the third of which doubles.
        scale, tracker = (1024.0 / 4, 2) if poisoned else (4096.0, 2)
        assert plugin.scaler is not None
        assert (plugin.scaler.get_scale(), plugin.scaler.state_dict()["_growth_tracker"]) == (scale, tracker)
    torch.testing.assert_close(*states, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("how", CLIPPING)
@pytest.mark.parametrize("weighted", [False, True], ids=["short", "weighted"])
def test_windows_give_the_same_bits_in_registers_and_in_memory(how: str, weighted: bool) -> None:
    """The last of three windows is short; weights are known at a window's end only."""

    class Weighted(Plain):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "weight": 1.0 + batch_idx % 3} if weighted else loss

    results = []
    for callbacks in ([], [Watches()]):
        model, plugin = Weighted(adamw), float16(growth_interval=2)
        fitted(
            model, batches(11), max_epochs=2, plugins=plugin, accumulate_grad_batches=4, callbacks=callbacks,
            **CLIPPING[how][0],
        )  # fmt: skip
        assert plugin.scaler is not None
        results.append([model.losses, model.state_dict(), plugin.scaler.state_dict()])
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.0, atol=0.0)


def test_without_a_kernel_the_scaler_unscales() -> None:
    """And for a scaler that is not torch's own."""
    nadam = lambda ps: torch.optim.NAdam(ps, lr=0.01)  # noqa: E731
    model, plugin = Plain(nadam), float16()
    made = fitted(model, SPIKE, max_epochs=2, plugins=plugin, gradient_clip_val=2.0)
    assert "gradients unscaled in memory" in made.explain()
    losses, _, own = by_hand(SPIKE, 20, nadam, 1, CLIPPING["norm"][1])
    assert str(model.losses) == str(losses)
    assert plugin.scaler is not None and plugin.scaler.state_dict() == own.state_dict()


def test_hooks_see_the_scaled_loss_and_unscaled_gradients() -> None:
    seen: dict[str, Any] = {}

    class Looks(Plain):
        def on_before_backward(self, loss: Tensor) -> None:
            seen["loss"] = loss.item() / self.trainer.scaler.get_scale()

        def on_after_backward(self) -> None:
            seen["scaled"] = self.net[0].weight.grad.clone()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen["unscaled"] = self.net[0].weight.grad.clone()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen["output"] = outputs["loss"].item()

    model = Looks(adamw)
    fitted(model, batches(1), max_epochs=1, plugins=[float16()])
    assert seen["loss"] == seen["output"] == model.losses[0]
    assert torch.equal(seen["scaled"], seen["unscaled"] * 1024.0)


def test_a_skipped_batch_takes_no_step() -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    model, plugin = Skips(adamw), float16()
    made = fitted(model, batches(3), max_epochs=1, plugins=plugin)
    assert made.global_step == 3
    assert plugin.scaler is not None and plugin.scaler.state_dict()["_growth_tracker"] == 2


def test_manual_optimization_with_two_optimizers() -> None:
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [adamw(self.net[0].parameters()), adamw(self.net[2].parameters())]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    model, plugin = Two(), float16()
    fitted(model, SPIKE, max_epochs=2, plugins=plugin)
    net, own, losses = network(), scaler(), []
    both = [adamw(net[0].parameters()), adamw(net[2].parameters())]
    for batch in SPIKE * 2:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (net(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        losses.append(loss.item())
        for optimizer in both:
            optimizer.zero_grad()
        own.scale(loss).backward()
        for optimizer in both:
            own.unscale_(optimizer)
            own.step(optimizer)
            own.update()
    assert str(model.losses) == str(losses)
    assert plugin.scaler is not None and plugin.scaler.state_dict() == own.state_dict()


def test_the_scale_is_in_the_checkpoint_and_comes_back(tmp_path: Path) -> None:
    def run(steps: int, resume: Path | None = None) -> tuple[list[float], lit_fast.Trainer]:
        model = Plain(adamw)
        made = lit_fast.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_steps=steps, plugins=float16(),
        )  # fmt: skip
        made.fit(model, batches(10), ckpt_path=resume)
        made.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model.losses, made

    straight, _ = run(20)
    first, made = run(12)
    held = torch.load(tmp_path / "12.ckpt", weights_only=True)["MixedPrecision"]
    assert held == made.scaler.state_dict() and held["scale"] == 1024.0 * 4 and held["_growth_tracker"] == 2
    second, resumed = run(20, tmp_path / "12.ckpt")
    assert first + second == straight
    assert resumed.scaler.state_dict()["scale"] == 1024.0 * 16


def test_a_scaler_of_somebody_else_takes_the_step_itself() -> None:
    class Counts(torch.amp.GradScaler):
        stepped = 0

        def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self.stepped += 1
            return super().step(optimizer, *args, **kwargs)

    own = Counts("cpu", init_scale=1024.0, growth_interval=5)
    model = Plain(adamw)
    fitted(model, SPIKE, max_epochs=3, plugins=MixedPrecision("16-mixed", "cpu", own))
    assert own.stepped == 30
    assert str(model.losses) == str(by_hand(SPIKE, 30, adamw)[0])


def test_what_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="LBFGS cannot be combined"):
        fitted(Plain(torch.optim.LBFGS), batches(1), max_epochs=1, plugins=float16())
    with pytest.raises(MisconfigurationException, match="needs no scaled loss"):
        MixedPrecision("bf16-mixed", "cpu", scaler())
    with pytest.raises(MisconfigurationException, match="allowed are '16-mixed' and 'bf16-mixed'"):
        MixedPrecision("16-true", "cpu")
