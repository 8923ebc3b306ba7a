"""Manual optimization under the step profiler: what `training_step` calls by itself has its phase."""

from __future__ import annotations

import copy
import pickle
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, network
from torch.optim.lr_scheduler import StepLR

import lit_fast
from lit_fast.distributed.flights import put_method
from lit_fast.profiler.record import Profile
from lit_fast.profiler.step import StepProfiler

PLANTED: dict[str, float] = {}  # s by phase, as they passed: what a phase must have at least


@pytest.fixture(autouse=True)
def _nothing_planted() -> None:
    PLANTED.clear()


def plant(phase: str, seconds: float) -> None:
    began = perf_counter()
    sleep(seconds)
    PLANTED[phase] = PLANTED.get(phase, 0.0) + perf_counter() - began


class Slow(torch.optim.SGD):
    """Of nobody's kernels: its own step runs."""

    def step(self, closure: Any = None) -> Any:
        plant("optimizer", 0.002)
        return super().step(closure)


class SlowSteps(StepLR):
    def step(self, epoch: int | None = None) -> None:
        if self._step_count:  # the first is its constructor's
            plant("schedulers", 0.001)
        super().step(epoch)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        plant("backward", 0.003)
        return grad


class Gan(lit_fast.LightningModule):
    """Two optimizers in turns, with a scheduler each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = network(), network()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.generator, self.critic), strict=True):
            self.toggle_optimizer(optimizer)
            loss = SlowBackward.apply(net(batch).square().mean())
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        made = [Slow(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]
        return made, [SlowSteps(each, 10) for each in made]


def recorded(model: Any, data: Any, **options: Any) -> Profile:
    profiler = StepProfiler(show=False)
    fitted(model, data, profiler=profiler, max_epochs=1, **options)
    profile = profiler.profile()
    assert sum(row.seconds for row in profile.phases) == pytest.approx(profile.wall, rel=1e-12)
    return profile


def in_steps(profile: Profile) -> dict[str, float]:
    """Seconds of the steps alone."""
    return {row.name: row.per_step.total for row in profile.phases}


def holds_what_was_planted(profile: Profile) -> None:
    """Phases add up, so that one that had another's time would leave that one short."""
    spent = in_steps(profile)
    assert PLANTED and all(spent[phase] >= seconds for phase, seconds in PLANTED.items())
    assert sum(spent.values()) == pytest.approx(profile.steps.total, rel=1e-9)
    assert spent.get("unexplained", 0.0) <= 0.02 * profile.steps.total


def test_a_gan_adds_up() -> None:
    profile = recorded(Gan(), batches(20))
    holds_what_was_planted(profile)
    assert set(PLANTED) == {"optimizer", "schedulers", "backward"}
    calls = {row.name: row.calls for row in profile.phases}
    # In the optimizers' phase: two toggles, a release, clipping and a step each.
    assert (calls["backward"], calls["schedulers"], calls["optimizer"]) == (40, 40, 200)


def test_a_closure_is_no_time_of_the_optimizer() -> None:
    class WithClosure(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, net in zip(self.optimizers(), (self.generator, self.critic), strict=True):

                def closure(net: Any = net) -> Any:
                    plant("forward", 0.004)
                    loss = SlowBackward.apply(net(batch).square().mean())
                    self.manual_backward(loss)
                    return loss

                optimizer.zero_grad()
                optimizer.step(closure=closure)

    holds_what_was_planted(recorded(WithClosure(), batches(5)))
    assert set(PLANTED) == {"forward", "optimizer", "backward"}


def test_nothing_of_it_is_left_after_the_run() -> None:
    during: list[Any] = []

    class Looks(lit_fast.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            [first, _] = pl_module.lr_schedulers()
            during.append((type(first) is SlowSteps, isinstance(first, SlowSteps), sorted(first.state_dict())))
            copied = copy.deepcopy(pl_module)
            during.append([name for name in vars(copied) if "toggle" in name])

    model, plain = Gan(), Gan()
    made = fitted(model, batches(1), profiler="step", max_epochs=1, callbacks=[Looks()])
    [scheduler, _] = model.lr_schedulers()
    assert during == [(False, True, sorted(scheduler.state_dict())), []]
    assert type(scheduler) is SlowSteps and not {"toggle_optimizer", "untoggle_optimizer"} & set(vars(model))
    assert not {"backward", "clip_gradients"} & set(vars(made.strategy)) and made.strategy.flights is None
    without = fitted(plain, batches(1), max_epochs=1)
    for optimizer in without.strategy._lightning_optimizers:
        assert not hasattr(optimizer._run_step, "__wrapped__") and not hasattr(optimizer._release, "__wrapped__")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_schedulers_that_watch_a_metric() -> None:
    class Watches(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            class SlowPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
                def step(self, *args: Any) -> None:
                    sleep(0.005)
                    super().step(*args)

            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": SlowPlateau(optimizer), "monitor": "loss"}}

    assert recorded(Watches(), batches(3)).phase("schedulers") >= 0.005


def test_what_is_timed_can_be_copied_and_pickled() -> None:
    parameter = torch.nn.Parameter(torch.ones(()))
    scheduler = StepLR(torch.optim.SGD([parameter], lr=1.0), step_size=1, gamma=0.5)
    called: list[None] = []
    undo = put_method(scheduler, "step", lambda: called.append(None))
    for made in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(made) is StepLR
        made.optimizer.step()
        made.step()
        assert made.get_last_lr() == [0.5] and scheduler.get_last_lr() == [1.0] and not called
    scheduler.step()
    assert len(called) == 1
    undo()
    assert type(scheduler) is StepLR
