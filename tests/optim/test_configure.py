"""Forms that `configure_optimizers` may return, and those that it may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lit_fast.errors import MisconfigurationException
from lit_fast.optim.configure import LRSchedulerConfig, parse_optimizers


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


A, B = sgd(), sgd()
SCHEDULER = StepLR(A, 1)
PLATEAU = ReduceLROnPlateau(A)


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


@pytest.mark.parametrize(
    "returned,message",
    [
        ("adam", "returned str where an optimizer belongs; allowed: an optimizer, a list"),
        ([A, 3], "returned int"),
        (([A], [3]), "scheduler of an optimizer that it did not return"),
        ({"lr_scheduler": SCHEDULER}, r"keys \['lr_scheduler'\]; allowed are 'optimizer'"),
        ([A, B], "returned 2 optimizers; automatic optimization takes one"),
        (([A], [{"interval": "step"}]), "'scheduler' is needed"),
        (([A], [{"scheduler": SCHEDULER, "interval": "batch"}]), "interval='batch'; allowed are 'step' and 'epoch'"),
        (([A], [{"scheduler": SCHEDULER, "frequency": 0}]), "frequency=0"),
        (([A], [PLATEAU]), "needs the name of the logged value"),
        (([B], [SCHEDULER]), "did not return; return both"),
    ],
)
def test_wrong_forms(returned: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        parse_optimizers(returned, automatic=True)


def test_no_optimizer_warns_and_trains_nothing() -> None:
    model = Plain(lambda parameters: None)
    before = model.net[0].weight.clone()
    with pytest.warns(UserWarning, match="nothing will be trained"):
        made = fitted(model, batches(3), max_epochs=1)
    assert made.global_step == 0 and torch.equal(before, model.net[0].weight)


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


@pytest.mark.parametrize(
    "returned,message",
    [
        ({"optimizer": A, "scheduler": SCHEDULER}, r"\['scheduler'\], which nothing reads.*lr_scheduler, monitor"),
        (([A], [{"scheduler": SCHEDULER, "every": 2}]), r"\['every'\], which nothing reads; allowed are frequency"),
    ],
)
def test_keys_that_nothing_reads(returned: Any, message: str) -> None:
    with pytest.warns(RuntimeWarning, match=message):
        optimizers, _ = parse_optimizers(returned, True)
    assert optimizers == [A]
