"""What callbacks and users read of a Trainer, and what they write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, trainer

import lit_fast
from lit_fast.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lit_fast.errors import CheckpointError, MisconfigurationException
from lit_fast.loggers import CSVLogger, DummyLogger


def test_before_anything_ran() -> None:
    made = trainer()
    assert made.lightning_module is None and made.model is None and made.train_dataloader is None
    assert made.val_dataloaders is None and made.test_dataloaders is None and made.predict_dataloaders is None
    assert (made.global_step, made.current_epoch, made.num_training_batches) == (0, 0, math.inf)
    assert (made.num_val_batches, made.num_test_batches, made.num_predict_batches) == ([], [], [])
    assert made.optimizers == [] and made.lr_scheduler_configs == [] and made.scaler is None
    assert (made.state.fn, made.state.stage, made.state.status.value) == (None, None, "initializing")
    assert not made.interrupted and not made.received_sigterm and not made.enable_validation and not made.should_stop
    with pytest.raises(AttributeError, match="'Trainer' object has no attribute 'nothing'"):
        _ = made.nothing


def test_one_device() -> None:
    made = trainer()
    assert (made.device_ids, made.num_devices, made.num_nodes, made.world_size) == ([0], 1, 1, 1)
    assert (made.global_rank, made.local_rank, made.node_rank, made.is_global_zero) == (0, 0, 0, True)
    assert made.distributed_sampler_kwargs is None and made.accelerator.name() == "cpu"
    assert made.strategy.accelerator is made.accelerator and made.precision_plugin.precision == "32-true"


def test_options_that_are_written_hold_from_the_next_run_on() -> None:
    model = Plain()
    made = trainer(max_epochs=1)
    made.fit(model, batches(4))
    made.limit_train_batches = 2
    made.fit_loop.max_epochs = 2
    made.fit(model, batches(4))
    assert (made.global_step, made.num_training_batches, made.limit_train_batches) == (6, 2, 2)
    made.accumulate_grad_batches = 2
    made.fit_loop.max_epochs = 3
    made.fit(model, batches(4))
    assert made.global_step == 7
    with pytest.raises(MisconfigurationException, match="limit_val_batches=-1"):
        made.limit_val_batches = -1


@pytest.mark.parametrize("stage", ["training", "validating", "testing", "predicting", "sanity_checking"])
def test_stages_may_be_set(stage: str) -> None:
    made = trainer()
    setattr(made, stage, True)
    stages = ("training", "validating", "testing", "predicting", "sanity_checking")
    assert [name for name in stages if getattr(made, name)] == [stage]
    assert made.evaluating == (stage in ("validating", "testing", "sanity_checking"))
    other = "training" if stage != "training" else "testing"
    setattr(made, other, False)
    assert getattr(made, stage), "only the running stage can be ended"
    setattr(made, stage, False)
    assert made.state.stage is None


def test_loggers_may_be_set(tmp_path: Path) -> None:
    made = trainer(default_root_dir=tmp_path)
    assert made.logger is None and made.log_dir == str(tmp_path)
    first, second = CSVLogger(tmp_path, name="a"), DummyLogger()
    made.logger = first
    assert made.loggers == [first] and made.log_dir == str(tmp_path / "a" / "version_0")
    made.loggers = [second, first]
    assert made.logger is second
    made.loggers = None
    assert made.loggers == [] and made.logger is None


def test_default_root_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert trainer().default_root_dir == str(tmp_path)
    assert trainer(default_root_dir="~/runs/../logs").default_root_dir == str(tmp_path / "logs")
    assert trainer(default_root_dir=tmp_path / "a").default_root_dir == str(tmp_path / "a")


def test_callbacks_by_kind() -> None:
    class OwnBar(RichProgressBar):
        pass

    early, also, best, bar = EarlyStopping("a"), EarlyStopping("b"), ModelCheckpoint(), OwnBar()
    made = lit_fast.Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, callbacks=[best, early, bar, also]
    )
    assert made.callbacks == [early, bar, also, best], "checkpoints come last"
    assert (made.early_stopping_callback, made.early_stopping_callbacks) == (early, [early, also])
    assert (made.checkpoint_callback, made.checkpoint_callbacks) == (best, [best])
    assert made.progress_bar_callback is bar
    bare = trainer()
    assert (bare.early_stopping_callback, bare.checkpoint_callback, bare.progress_bar_callback) == (None, None, None)


class Asks(Plain):
    """Looks at the length of the fit where schedulers are made."""

    def configure_optimizers(self) -> Any:
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 4}, 4),
        ({"fast_dev_run": 2}, 2),
    ],
)
def test_estimated_stepping_batches(options: dict[str, Any], expected: int) -> None:
    model = Asks()
    made = fitted(model, batches(5), **options)
    assert model.steps == expected == made.global_step


def test_estimated_stepping_batches_without_an_end() -> None:
    endless = trainer(max_epochs=-1)
    assert endless.estimated_stepping_batches == math.inf
    model = Asks()
    fitted(model, NoLength(batches(2)), max_epochs=1)
    assert model.steps == math.inf
    fitted(model, NoLength(batches(2)), max_epochs=1, max_steps=1)
    assert model.steps == 1


def test_validation_is_enabled_where_there_is_everything_for_it() -> None:
    class Validates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    assert not fitted(Plain(), batches(1), [batches(1)], max_epochs=1).enable_validation
    assert not fitted(Validates(), batches(1), max_epochs=1).enable_validation
    assert not fitted(Validates(), batches(1), [batches(1)], max_epochs=1, limit_val_batches=0).enable_validation
    made = fitted(Validates(), batches(1), [batches(3)], max_epochs=1)
    assert made.enable_validation and made.num_val_batches == [3] and made.num_sanity_val_batches == [2]


# -- where a run begins


class Begins(Plain):
    def setup(self, stage: str) -> None:
        self.began = [self.trainer.ckpt_path]

    def on_train_start(self) -> None:
        self.began.append(self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.fixture
def saved(tmp_path: Path) -> str:
    made = fitted(Plain(), batches(4), max_steps=2)
    made.save_checkpoint(tmp_path / "two.ckpt")
    return str(tmp_path / "two.ckpt")


def test_a_path_that_was_set_is_where_runs_begin(saved: str) -> None:
    model, made = Begins(), trainer(max_steps=4)
    made.ckpt_path = saved
    made.fit(model, batches(4))
    assert (model.began, made.global_step, made.ckpt_path) == ([saved, 2], 4, saved)
    model = Begins()
    made.validate(model, batches(1))  # it stays set
    assert torch.equal(model.net[0].weight, torch.load(saved)["state_dict"]["net.0.weight"])
    made.validate(dataloaders=batches(1))  # and is what a run without a model loads
    made.ckpt_path = None
    made.validate(model, batches(1))
    assert made.ckpt_path is None


def test_a_path_that_is_passed_goes_before_the_one_that_was_set(saved: str) -> None:
    model, made = Begins(), trainer(max_steps=3)
    made.ckpt_path = "another.ckpt"
    with pytest.warns(UserWarning, match=r"was set to 'another.ckpt'.*the latter is loaded"):
        made.fit(model, batches(4), ckpt_path=saved)
    assert model.began == [saved, 2] and made.ckpt_path == saved
    made.validate(model, batches(1))  # what was passed holds for its run alone
    assert made.ckpt_path is None


# -- callbacks that come later


class Stateful(lit_fast.Callback):
    def __init__(self, name: str) -> None:
        self.name, self.started = name, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}


def test_a_callback_of_the_module_takes_the_place_of_one_of_its_class(caplog: Any) -> None:
    class Own(Plain):
        def configure_callbacks(self) -> Any:
            return Stateful("own")

    with caplog.at_level("INFO", logger="lit_fast"):
        made = fitted(Own(), batches(1), max_epochs=1, callbacks=[Stateful("given")])
    assert [callback.name for callback in made.callbacks] == ["own"]
    assert "Own.configure_callbacks takes the place of these callbacks of the Trainer: Stateful." in caplog.messages


def test_callbacks_that_are_appended_may_share_a_name_in_checkpoints() -> None:
    made = trainer(max_epochs=1)
    made.callbacks += [Stateful("a"), Stateful("b")]
    made.fit(Plain(), batches(1))
    assert all(callback.started for callback in made.callbacks) and len(made.callbacks) == 2
    with pytest.raises(MisconfigurationException, match="state_key 'Stateful'"):
        trainer(callbacks=[Stateful("a"), Stateful("b")])


def test_an_open_file_is_no_place_to_begin(saved: str) -> None:
    with open(saved, "rb") as file:
        with pytest.raises(CheckpointError, match="BufferedReader; a run begins from a path"):
            trainer(max_steps=4).fit(Plain(), batches(4), ckpt_path=file)
        loaded = Plain.load_from_checkpoint(file)
    assert torch.equal(loaded.net[0].weight, torch.load(saved)["state_dict"]["net.0.weight"])
    with pytest.raises(CheckpointError, match=r"'http://nowhere/a\.ckpt' is remote"):
        trainer(max_steps=4).fit(Plain(), batches(4), ckpt_path="http://nowhere/a.ckpt")
