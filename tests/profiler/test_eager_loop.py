"""The loop by hand: the losses of a fit to the last bit, and errors where there is no such loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, shuffled, trainer
from torch import nn

import lit_fast
from lit_fast.errors import NotByHandError, ProfileError
from lit_fast.precision import MixedPrecision
from lit_fast.profiler.eager import EagerLoop
from lit_fast.profiler.step import StepProfiler


def by_hand(module: Any, data: Any, steps: int, **options: Any) -> EagerLoop:
    """Trains `module`, so many micro-batches."""
    loop = EagerLoop(module, trainer(**{"max_epochs": 10, **options}), data, None, StepProfiler())
    loop.clock.start()
    for _ in islice(loop.steps, steps):
        pass
    return loop


def same_losses(module: Any, data: Callable[[], Any], epochs: int, steps: int, **options: Any) -> EagerLoop:
    ours, theirs = module, copy.deepcopy(module)
    torch.manual_seed(5)
    fitted(ours, data(), max_epochs=epochs, **options)
    torch.manual_seed(5)
    loop = by_hand(theirs, data(), steps, max_epochs=epochs, **options)
    assert len(ours.losses) == steps
    assert theirs.losses == ours.losses
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))
    return loop


class Scheduled(Plain):
    """Learning rates by step and by epoch; dropout, so that random numbers must be drawn in the same order."""

    interval, frequency = "step", 2

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.drop = nn.Dropout(0.3)

    def loss(self, batch: Any) -> Any:
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        return super().loss(self.drop(batch))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        config = {"scheduler": scheduler, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


def test_a_plain_module_needs_few_lines() -> None:
    loop = same_losses(Plain(), lambda: shuffled(48), 3, 36)
    body = loop.source.partition("enumerate(batches):\n")[2].split("\n")
    assert [line.strip() for line in body if line] == [
        "output = forward(batch, batch_idx)",
        "loss = read(output)",
        "zero_grad()",
        "backward(loss)",
        "step()",
        "run.global_step += 1",
        "yield",
    ]


@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_clipping(clip: dict[str, Any]) -> None:
    loop = same_losses(Plain(), lambda: batches(9), 2, 18, **clip)
    assert "clip()" in loop.source


def test_accumulation_weighs_the_last_window_by_its_length() -> None:
    same_losses(Plain(), lambda: shuffled(40), 3, 30, accumulate_grad_batches=4)
    same_losses(Plain(), lambda: batches(8), 2, 16, accumulate_grad_batches=4, gradient_clip_val=0.1)
    same_losses(Plain(), lambda: batches(9), 2, 14, accumulate_grad_batches=3, limit_train_batches=7)


@pytest.mark.parametrize("interval, frequency", [("step", 1), ("step", 3), ("epoch", 1), ("epoch", 2)])
def test_schedulers_and_dropout(interval: str, frequency: int) -> None:
    module = Scheduled()
    module.interval, module.frequency = interval, frequency
    same_losses(module, lambda: shuffled(24), 4, 24)


def test_scheduler_by_step_under_accumulation() -> None:
    same_losses(Scheduled(), lambda: shuffled(40), 3, 30, accumulate_grad_batches=4)


def test_autocast_and_scaler() -> None:
    same_losses(Plain(), lambda: batches(6), 2, 12, precision="bf16-mixed", gradient_clip_val=1.0)
    for clip in (None, 0.1):
        ours, theirs = Plain(), Plain()
        fitted(ours, batches(6), max_epochs=2, plugins=MixedPrecision("16-mixed", "cpu"), gradient_clip_val=clip)
        loop = by_hand(theirs, batches(6), 12, plugins=MixedPrecision("16-mixed", "cpu"), gradient_clip_val=clip)
        assert theirs.losses == ours.losses
        assert loop.run.scaler is not None and "backward(scale(loss))" in loop.source


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(precision: str) -> None:
    theirs, ours = Plain(), Plain()
    fitted(ours, batches(6), max_epochs=1, precision=precision)
    by_hand(theirs, batches(6), 6, precision=precision)
    assert theirs.net[0].weight.dtype is ours.net[0].weight.dtype
    assert theirs.losses[0] == ours.losses[0]
    assert theirs.losses == pytest.approx(ours.losses, rel=2**-7)  # an ulp of bfloat16's eight bits


def test_hooks_of_the_module_are_called_in_their_places() -> None:
    class Hooked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[str] = []

        def on_train_start(self) -> None:
            self.heard.append("start")

        def on_train_epoch_start(self) -> None:
            self.heard.append(f"epoch {self.current_epoch}")

        def on_after_backward(self) -> None:
            self.heard.append("after backward")
            for parameter in self.parameters():
                parameter.grad.mul_(0.5)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.heard.append(type(optimizer).__name__)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.heard.append(f"end {batch_idx} {outputs['loss'].item():.9f} {self.global_step}")

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch * 2

        def on_train_epoch_end(self) -> None:
            self.heard.append("epoch's end")

    ours, theirs = Hooked(), Hooked()
    fitted(ours, batches(3), max_epochs=2)
    loop = by_hand(theirs, batches(3), 6, max_epochs=2)
    next(loop.steps)  # what follows the last step of an epoch comes with the next one
    assert theirs.losses[:6] == ours.losses
    assert theirs.heard[: len(ours.heard)] == ours.heard


def test_manual_optimization() -> None:
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            for optimizer in (first, second):
                loss = super().training_step(batch, batch_idx)
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            self.log("loss", loss)
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
            second = torch.optim.SGD(self.net[2].parameters(), lr=0.1)
            return [first, second], [torch.optim.lr_scheduler.StepLR(first, 2, 0.5)]

    ours, theirs = Manual(), Manual()
    made = fitted(ours, batches(5), max_epochs=2)
    loop = by_hand(theirs, batches(5), 10)
    assert theirs.losses == ours.losses and len(ours.losses) == 20
    assert loop.run.global_step == made.global_step == 20


def test_data_of_several_loaders_and_without_a_length() -> None:
    class Sum(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"][0] + batch["b"][0], batch_idx)

    same_losses(Sum(), lambda: {"a": shuffled(16), "b": shuffled(8)}, 2, 8)
    same_losses(Plain(), lambda: NoLength(batches(5)), 2, 10)


def test_the_optimizer_is_torchs_own() -> None:
    loop = by_hand(Plain(torch.optim.AdamW), batches(3), 3)
    (optimizer,) = loop.run.optimizers
    assert type(optimizer) is torch.optim.AdamW and "step" not in vars(optimizer)
    assert loop.clock.phases()["optimizer"] > 0.0


class Steps(Plain):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class Foreign(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Iterates(Plain):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


class Watches(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}


@pytest.mark.parametrize(
    "module, options, said",
    [
        (Steps(), {}, "Steps.optimizer_step"),
        (Iterates(), {}, "takes the iterator"),
        (Watches(), {}, "ReduceLROnPlateau watches"),
        (Plain(torch.optim.LBFGS), {}, "LBFGS"),
        (Plain(lambda p: Foreign(p, lr=0.1)), {}, "Foreign"),
        (Plain(lambda p: None), {}, "no optimizer"),
        (Plain(), {"nonfinite": "skip"}, "nonfinite='skip'"),
        (Plain(), {"grad_dtype": "float32", "precision": "bf16-true"}, "grad_dtype"),
        (Plain(), {"overfit_batches": 2}, "overfit_batches"),
        (Plain(), {"devices": 2}, "DDPStrategy"),
    ],
)  # fmt: skip
def test_what_nobody_writes_by_hand_is_an_error(module: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        by_hand(module, batches(4), 1, **options)


def test_accumulation_needs_a_length() -> None:
    with pytest.raises(ProfileError, match="no length"):
        by_hand(Plain(), NoLength(batches(4)), 1, accumulate_grad_batches=2)


def test_losses_without_a_counterpart() -> None:
    class Weighs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "weight": 2}

    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any: ...

    with pytest.raises(ProfileError, match="a weight"):
        by_hand(Weighs(), batches(2), 1)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ProfileError, match="None"):
        by_hand(Skips(), batches(2), 1)


def test_what_a_loop_does_not_have_is_named() -> None:
    class Asks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert not hasattr(self.trainer, "something")
            assert self.trainer.num_training_batches == 3 and self.trainer.is_global_zero
            self.print("nothing")
            return self.loss(batch) * self.trainer.fit_loop.epoch_progress

    with pytest.raises(NotByHandError, match=r"trainer\.fit_loop"):
        by_hand(Asks(), batches(3), 1)


def test_a_traceback_shows_the_line() -> None:
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("here")

    with pytest.raises(KeyError) as caught:
        by_hand(Broken(), batches(3), 1)
    assert any("output = forward(batch, batch_idx)" in str(entry.statement) for entry in caught.traceback)


def test_a_datamodule_gives_the_loader() -> None:
    class Data(lit_fast.LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches(4)

    theirs, ours = Plain(), Plain()
    made = trainer(max_epochs=1)
    made.fit(ours, datamodule=Data())
    loop = EagerLoop(theirs, trainer(max_epochs=1), None, Data(), StepProfiler())
    loop.clock.start()
    for _ in islice(loop.steps, 4):
        pass
    assert theirs.losses == ours.losses
