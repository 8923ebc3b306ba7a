"""Forms that `configure_optimizers` may return, and those that it may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lit_fast.errors import MisconfigurationException
from lit_fast.optim.configure import LRSchedulerConfig, parse_optimizers
from lit_fast.optim.lightning_optimizer import LightningOptimizer


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


A, B = sgd(), sgd()
SCHEDULER = StepLR(A, 1)
PLATEAU = ReduceLROnPlateau(A)
ONE_CYCLE = OneCycleLR(A, 0.1, 10)


@pytest.mark.parametrize(
    "returned,optimizers,schedulers",
    [
        (None, [], []),
        (A, [A], []),
        ([A], [A], []),
        ((A,), [A], []),
        (([A], []), [A], []),
        (([A], [SCHEDULER]), [A], [("epoch", 1)]),
        (([A], [{"scheduler": SCHEDULER, "interval": "step", "frequency": 3}]), [A], [("step", 3)]),
        ({"optimizer": A}, [A], []),
        ({"optimizer": A, "lr_scheduler": SCHEDULER}, [A], [("epoch", 1)]),
        ({"optimizer": A, "lr_scheduler": {"scheduler": SCHEDULER, "interval": "step"}}, [A], [("step", 1)]),
        ({"optimizer": A, "lr_scheduler": LRSchedulerConfig(SCHEDULER, frequency=2)}, [A], [("epoch", 2)]),
        ([{"optimizer": A, "lr_scheduler": None}], [A], []),
    ],
)
def test_forms(returned: Any, optimizers: list[Any], schedulers: list[Any]) -> None:
    found, configs = parse_optimizers(returned, automatic=True)
    assert len(found) == len(optimizers) and all(a is b for a, b in zip(found, optimizers, strict=True))
    assert [(config.interval, config.frequency) for config in configs] == schedulers


def test_several_in_manual_optimization() -> None:
    found, configs = parse_optimizers([{"optimizer": A, "lr_scheduler": SCHEDULER}, {"optimizer": B}], automatic=False)
    assert found == [A, B] and [config.scheduler for config in configs] == [SCHEDULER]


def test_plateau_names_its_metric() -> None:
    for returned in (
        {"optimizer": A, "lr_scheduler": PLATEAU, "monitor": "val"},
        {"optimizer": A, "lr_scheduler": {"scheduler": PLATEAU, "monitor": "val"}},
        ([A], [{"scheduler": PLATEAU, "monitor": "val"}]),
    ):
        (config,) = parse_optimizers(returned, automatic=True)[1]
        assert config.reduce_on_plateau and config.monitor == "val"


class Stateless:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class Custom(Stateless):
    """A scheduler with an API of its own, as timm's have."""

    def step(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.1 / (epoch + 2)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    "returned,message",
    [
        ("adam", "returned str where an optimizer belongs; allowed: an optimizer, a list"),
        ([A, 3], "returned int"),
        ((A, SCHEDULER), "returned StepLR where an optimizer belongs"),
        (([A], [3]), "scheduler of an optimizer that it did not return"),
        ({"lr_scheduler": SCHEDULER}, r"keys \['lr_scheduler'\]; allowed are 'optimizer'"),
        ([A, B], "returned 2 optimizers; automatic optimization takes one"),
        (([A], [{"interval": "step"}]), "'scheduler' is needed"),
        (([A], [{"scheduler": SCHEDULER, "interval": "batch"}]), "interval='batch'; allowed are 'step' and 'epoch'"),
        (([A], [{"scheduler": SCHEDULER, "frequency": 0}]), "frequency=0"),
        (([A], [PLATEAU]), "needs the name of the logged value"),
        ({"optimizer": A, "lr_scheduler": {"scheduler": PLATEAU}, "monitor": "val"}, "watches, beside it"),
        ([{"optimizer": A, "lr_scheduler": PLATEAU, "monitor": "val"}], "watches, beside it"),
        (([B], [SCHEDULER]), "did not return; return both"),
        (([A], [Stateless(A)]), "no state_dict"),
        (([A], [Custom(A)]), "Override lr_scheduler_step"),
    ],
)
def test_wrong_forms(returned: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        parse_optimizers(returned, automatic=True)


@pytest.mark.parametrize(
    "returned,automatic,message",
    [
        ({"optimizer": A, "frequency": 2}, True, "keys that mean nothing: 'frequency'"),
        (([A], [{"scheduler": SCHEDULER, "every": 2}]), True, "keys that mean nothing: 'every'"),
        (([A], [ONE_CYCLE]), True, "'interval': 'step'"),
        (([A], [{"scheduler": SCHEDULER, "monitor": "x"}]), False, r"\['monitor'\], which nothing reads"),
    ],
)
def test_warnings(returned: Any, automatic: bool, message: str) -> None:
    with pytest.warns(RuntimeWarning, match=message):
        optimizers, schedulers = parse_optimizers(returned, automatic)
    assert optimizers == [A] and len(schedulers) == ("frequency" not in str(returned))


def test_wrapped_optimizers_are_taken_out_and_single_schedulers_taken_up() -> None:
    optimizers, (config,) = parse_optimizers(([LightningOptimizer(A)], SCHEDULER), automatic=True)
    assert optimizers == [A] and config.scheduler is SCHEDULER


def test_no_optimizer_warns_and_trains_nothing() -> None:
    """Its steps are counted, so that `max_steps` ends the fit."""
    model = Plain(lambda parameters: None)
    before = model.net[0].weight.clone()
    with pytest.warns(UserWarning, match="nothing will be trained"):
        made = fitted(model, batches(3), max_steps=5)
    assert made.global_step == 5 and torch.equal(before, model.net[0].weight)


def test_a_scheduler_with_an_api_of_its_own() -> None:
    seen: list[tuple[Any, float]] = []

    class Model(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [Custom(optimizer)]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(epoch=self.current_epoch)
            seen.append((metric, self.trainer.optimizers[0].param_groups[0]["lr"]))

    fitted(Model(), batches(2), max_epochs=3)
    assert seen == [(None, 0.1 / 2), (None, 0.1 / 3), (None, 0.1 / 4)]


def test_plateau_that_may_miss_its_metric() -> None:
    class Model(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "nothing", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    with pytest.warns(RuntimeWarning, match="'nothing', which was not logged"):
        fitted(Model(), batches(1), max_epochs=1)


def test_plateau_that_finds_no_metric() -> None:
    class Model(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="'val_loss', which was not logged; logged were: loss"):
        fitted(Model(), batches(1), max_epochs=1)
