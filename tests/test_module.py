"""`LightningModule`: what it knows of its trainer, manual optimization, and that it stays a plain torch module."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, trainer

import lit_fast
from lit_fast.errors import MisconfigurationException


class Bare(lit_fast.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)


def test_without_a_trainer() -> None:
    model = Bare()
    assert (model.current_epoch, model.global_step, model.global_rank) == (0, 0, 0)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.logger is None and model.loggers == []
    with pytest.raises(RuntimeError, match="Bare is not attached to a Trainer"):
        _ = model.trainer


def test_copies_and_pickles_leave_the_trainer_behind() -> None:
    model = Plain(torch.optim.Adam)
    fitted(model, batches(2), max_epochs=1)
    assert model.trainer.global_step == 2
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._trainer is None
        assert torch.equal(copied.net[0].weight, model.net[0].weight)


def test_state_dict_holds_parameters_only() -> None:
    model = Plain()
    before = set(model.state_dict())
    fitted(model, batches(2), max_epochs=1)
    assert set(model.state_dict()) == before == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}


def test_freeze_and_unfreeze() -> None:
    model = Plain()
    model.freeze()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    model.unfreeze()
    assert model.training and all(p.requires_grad for p in model.parameters())


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]


def test_toggling() -> None:
    class Toggles(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.net[0].bias.requires_grad = False
            with self.toggled_optimizer(first):
                wanted = [p.requires_grad for p in self.parameters()]
            assert wanted == [True, False, False, False]
            assert [p.requires_grad for p in self.parameters()] == [True, False, True, True]
            self.net[0].bias.requires_grad = True
            with second.toggle_model():
                assert [p.requires_grad for p in self.parameters()] == [False, False, True, True]
            assert all(p.requires_grad for p in self.parameters())
            self.ran = True

    model = Toggles()
    fitted(model, batches(1), max_epochs=1)
    assert model.ran


def test_optimizers_and_schedulers() -> None:
    class Looks(Manual):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            wrapped, plain = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            assert wrapped.optimizer is plain and wrapped.param_groups is plain.param_groups
            assert isinstance(self.lr_schedulers(), torch.optim.lr_scheduler.StepLR)
            self.lr_schedulers().step()

    model = Looks()
    made = fitted(model, batches(2), max_epochs=1)
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_manual_backward_under_automatic_optimization() -> None:
    class Wrong(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        fitted(Wrong(), batches(1), max_epochs=1)


@pytest.mark.parametrize("option", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_options_without_effect_in_manual_optimization(option: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="has no effect in manual optimization"):
        fitted(Manual(), batches(1), max_epochs=1, **option)


def test_wrong_return_in_manual_optimization() -> None:
    class Wrong(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return "text"

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(MisconfigurationException, match="training_step returned str"):
        fitted(Wrong(), batches(1), max_epochs=1)


def test_torch_compile() -> None:
    class Logs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

    model, plain = Logs(), Logs()
    compiled = torch.compile(model, backend="eager")
    before = set(model.__dict__)
    made = trainer(max_epochs=3)
    made.fit(compiled, batches(4), [batches(2)])
    straight = fitted(plain, batches(4), [batches(2)], max_epochs=3)
    assert set(made.callback_metrics) == {"train", "val"}
    assert made.callback_metrics == straight.callback_metrics
    assert set(model.__dict__) - before <= {"_trainer", "_metric_log"}
    assert made.lightning_module is model
    made.validate(compiled, [batches(2)], verbose=False)
    assert set(model.__dict__) - before <= {"_trainer", "_metric_log"}


def test_a_compiled_module_is_restored_after_an_error() -> None:
    class Breaks(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            raise KeyError("broken")

    model = Breaks()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(KeyError, match="broken"):
        trainer(max_epochs=1).fit(compiled, batches(1))
    assert "training_step" not in model.__dict__ and "log" not in model.__dict__


# -- how modules are written


class Extra:
    """Comes before the module among the bases, takes part in its construction, and overrides what it wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ended = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended += 1


class OneLayer:
    """No module by itself: steps and an optimizer for one that comes after it among the bases."""

    layer: torch.nn.Linear

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


class Mixed(Extra, OneLayer, lit_fast.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)


@dataclass(eq=False)
class AsDataclass(OneLayer, lit_fast.LightningModule):
    width: int = 8
    lr: float = 0.5

    def __post_init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(self.width, 1)


def test_a_mixin_overrides_steps_and_hooks() -> None:
    model = Mixed()
    assert fitted(model, batches(3), max_epochs=1).global_step == model.ended == 3


def test_a_module_may_be_a_dataclass(tmp_path: Any) -> None:
    model = AsDataclass(lr=0.25)
    made = fitted(model, batches(2), max_epochs=1)
    assert made.global_step == 2 and dict(model.hparams) == {"width": 8, "lr": 0.25}
    made.save_checkpoint(tmp_path / "a.ckpt")
    again = AsDataclass.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.lr == 0.25 and torch.equal(again.layer.weight, model.layer.weight)
