"""ModelCheckpoint: what it saves when, what it keeps, how files are called, what it refuses."""

from __future__ import annotations

import json
import os
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_standins import StandInTrainer
from model_checkpoint_scenarios import GOLDENS, outcome, scenarios

from lit_fast.callbacks import ModelCheckpoint
from lit_fast.errors import MisconfigurationException

ROWS = json.loads(GOLDENS.read_text())


def losses(*values: float) -> list[dict[str, Any]]:
    return [{"val_loss": torch.tensor(value)} for value in values]


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_the_recorded_scenarios_are_those_of_the_list() -> None:
    assert [{k: v for k, v in row.items() if k != "outcome"} for row in ROWS] == scenarios(len(ROWS))


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_leaves_behind_what_lightning_leaves(index: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert outcome(ModelCheckpoint, ROWS[index]) == ROWS[index]["outcome"]


@pytest.mark.parametrize(
    ("filename", "options", "expected"),
    [
        (None, {}, "epoch=2-step=7.ckpt"),
        ("{epoch:03d}", {}, "epoch=002.ckpt"),
        ("{epoch}-{val/loss:.2f}", {}, "epoch=2-val/loss=0.12.ckpt"),
        ("e{epoch}_{val/loss:.1e}", {"auto_insert_metric_name": False}, "e2_1.2e-01.ckpt"),
        ("{missing:d}", {}, "missing=0.ckpt"),
    ],
)
def test_names(filename: str | None, options: dict[str, Any], expected: str) -> None:
    metrics = {"epoch": torch.tensor(2), "step": 7, "val/loss": torch.tensor(0.1234)}
    callback = ModelCheckpoint(filename=filename, **options)
    assert callback.format_checkpoint_name(metrics) == expected
    assert callback.format_checkpoint_name(metrics, ver=3) == expected.replace(".ckpt", "-v3.ckpt")
    assert callback.format_checkpoint_name(metrics, prefix="p") == "p-" + expected
    assert "missing" not in metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_top_k": -2, "monitor": "x"}, "save_top_k=-2"),
        ({"save_top_k": 3}, "monitor=None"),
        ({"mode": "lower"}, "'min' and 'max'"),
        ({"save_last": "copy"}, "'link'"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"every_n_train_steps": 2, "every_n_epochs": 1}, "only one"),
        ({"every_n_train_steps": 2, "train_time_interval": timedelta(1)}, "only one"),
        ({"dirpath": "s3://bucket/runs"}, "local"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ModelCheckpoint(**options)


def test_only_hooks_that_the_options_need_are_live() -> None:
    always = {"setup", "on_train_epoch_end", "on_validation_end", "state_dict", "load_state_dict"}
    assert ModelCheckpoint().live_hooks() == always
    assert ModelCheckpoint(every_n_train_steps=5).live_hooks() == always | {"on_train_batch_end"}
    timed = ModelCheckpoint(train_time_interval=timedelta(minutes=1), save_last=True, save_on_exception=True)
    assert timed.live_hooks() == always | {
        "on_train_batch_end",
        "on_train_start",
        "on_train_end",
        "on_exception",
    }
    assert ModelCheckpoint.reads_gradients is False

    class Mine(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None:
            pass

    assert "on_train_batch_end" in Mine().live_hooks()
    assert Mine.reads_gradients is True


def test_the_old_file_goes_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    class Full(StandInTrainer):
        def save_checkpoint(self, path: str, weights_only: bool | None = None) -> None:
            if self.current_epoch == 1:
                raise OSError("No space left on device")
            super().save_checkpoint(path, weights_only)

    with pytest.raises(OSError, match="space"):
        Full(tmp_path).run(ModelCheckpoint(), losses(1, 2))
    assert files(tmp_path) == ["epoch=0-step=4.ckpt"]


def test_a_link_never_dangles(tmp_path: Path) -> None:
    states = []

    class Looks(ModelCheckpoint):
        def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
            states.append(os.path.exists(self.last_model_path))
            super()._remove_checkpoint(trainer, filepath)
            states.append(os.path.exists(self.last_model_path))

    StandInTrainer(tmp_path).run(Looks(save_last="link"), losses(1, 2, 3))
    assert states == [True] * 4
    assert files(tmp_path) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "epoch=2-step=12.ckpt"


def test_a_metric_that_nobody_logs_is_an_error_that_lists_what_is_logged(tmp_path: Path) -> None:
    trainer = StandInTrainer(tmp_path, num_val_batches=[2])
    with pytest.raises(MisconfigurationException, match=r"'val_lss'.*'val_loss'.*self\.log\('val_lss'"):
        trainer.run(ModelCheckpoint(monitor="val_lss"), losses(1))


def test_before_the_first_validation_a_missing_metric_is_only_a_warning(tmp_path: Path) -> None:
    trainer = StandInTrainer(tmp_path, check_val_every_n_epoch=2)
    callback = ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="no such metric"):
        trainer.run(callback, losses(1, 2))
    assert trainer.saved == ["epoch=1-step=8.ckpt"]


def test_without_any_validation_a_missing_metric_is_one_warning(tmp_path: Path) -> None:
    trainer = StandInTrainer(tmp_path, num_val_batches=[0])
    with pytest.warns(UserWarning, match="no such metric") as told:
        trainer.run(ModelCheckpoint(monitor="val_lss"), losses(1, 2, 3))
    assert len(told) == 1 and trainer.saved == []


def test_what_subclasses_override_is_what_runs(tmp_path: Path) -> None:
    """The methods that programs for Lightning override, each calling the base's."""
    called: list[str] = []

    def noted(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return getattr(ModelCheckpoint, name)(self, *args, **kwargs)

        return method

    names = """
        _save_topk_checkpoint _save_monitor_checkpoint _update_best_and_save _save_last_checkpoint _save_checkpoint
        _remove_checkpoint _should_remove_checkpoint _monitor_candidates _should_save_on_train_epoch_end
        _should_skip_saving_checkpoint _get_metric_interpolated_filepath_name file_exists check_monitor_top_k
        format_checkpoint_name
    """.split()
    mine = type("Mine", (ModelCheckpoint,), {name: noted(name) for name in names})
    StandInTrainer(tmp_path).run(mine(monitor="val_loss", save_last="link"), losses(2, 1))
    assert set(called) == set(names)
    assert files(tmp_path) == ["epoch=1-step=8.ckpt", "last.ckpt"]


def test_an_override_that_writes_its_own_file(tmp_path: Path) -> None:
    class Mine(ModelCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            Path(filepath).with_suffix(".pt").touch()

        def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._remove_checkpoint(trainer, filepath)
            Path(filepath).with_suffix(".pt").unlink()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, metrics)
            self._save_last_checkpoint(trainer, metrics)

    StandInTrainer(tmp_path).run(Mine(save_last="link"), losses(2, 1))
    assert files(tmp_path) == ["epoch=1-step=8.ckpt", "epoch=1-step=8.pt", "last.ckpt"]


def test_a_save_between_validations_waits_for_its_metric(tmp_path: Path) -> None:
    trainer = StandInTrainer(tmp_path)
    trainer.run(ModelCheckpoint(monitor="val_loss", every_n_train_steps=3), losses(0.5))
    assert trainer.saved == ["epoch=0-step=4.ckpt"]


def test_time_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("lit_fast.callbacks.model_checkpoint.time.monotonic", lambda: next(clock))
    trainer = StandInTrainer(tmp_path, num_training_batches=9)
    trainer.run(ModelCheckpoint(train_time_interval=timedelta(seconds=30), save_top_k=-1), losses(1))
    assert trainer.saved == [f"epoch=0-step={step}.ckpt" for step in (3, 6, 9)]


def test_directory_from_the_first_logger(tmp_path: Path) -> None:
    trainer = StandInTrainer(tmp_path)
    for version, folder in ((3, "version_3"), ("mine", "mine")):
        noted = []
        logger = SimpleNamespace(
            save_dir=str(tmp_path / "logs"), name="gpt", version=version, after_save_checkpoint=noted.append
        )
        trainer.loggers, trainer.global_step = [logger], 0
        callback = ModelCheckpoint()
        trainer.run(callback, losses(1))
        assert Path(callback.best_model_path).parent == tmp_path / "logs" / "gpt" / folder / "checkpoints"
        assert len(noted) == 1


def test_a_directory_in_use_warns_and_its_files_stay(tmp_path: Path) -> None:
    StandInTrainer(tmp_path).run(ModelCheckpoint(), losses(1))
    with pytest.warns(UserWarning, match="not empty"):
        StandInTrainer(tmp_path).run(ModelCheckpoint(), losses(1, 1))
    assert files(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]


def test_resuming_keeps_the_file_it_came_from_and_says_nothing(tmp_path: Path) -> None:
    first = ModelCheckpoint()
    StandInTrainer(tmp_path).run(first, losses(1))
    trainer = StandInTrainer(tmp_path, ckpt_path=first.best_model_path, global_step=4)
    again = ModelCheckpoint(dirpath=first.dirpath)
    again.load_state_dict(first.state_dict())
    assert again.best_model_path == first.best_model_path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run(again, losses(1))
    assert files(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=0-step=8.ckpt"]


def test_state_of_another_directory_is_left_alone(tmp_path: Path) -> None:
    first = ModelCheckpoint(monitor="val_loss")
    StandInTrainer(tmp_path).run(first, losses(1))
    other = ModelCheckpoint(monitor="val_loss", dirpath=tmp_path / "other")
    with pytest.warns(UserWarning, match="only best_model_path"):
        other.load_state_dict(first.state_dict())
    assert other.best_model_path == first.best_model_path and other.best_k_models == {}


def test_state_survives_a_safe_load(tmp_path: Path) -> None:
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
    StandInTrainer(tmp_path).run(callback, losses(3, 1, 2))
    torch.save(callback.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    again = ModelCheckpoint(monitor="val_loss", dirpath=callback.dirpath)
    again.load_state_dict(loaded)
    assert again.state_dict() == callback.state_dict()
    assert again.best_model_score == 1 and again.kth_value == 2


def test_exception_saves_only_when_asked(tmp_path: Path) -> None:
    for asked in (False, True):
        trainer = StandInTrainer(tmp_path, global_step=5)
        callback = ModelCheckpoint(save_on_exception=asked, every_n_epochs=5)
        callback.setup(trainer, None, "fit")
        callback.on_exception(trainer, None, KeyboardInterrupt())
        assert trainer.saved == (["epoch=0-step=5.ckpt"] if asked else [])


@pytest.mark.parametrize(
    "change", [{"fast_dev_run": True}, {"sanity_checking": True}, {"state": SimpleNamespace(fn="test")}]
)
def test_nothing_is_saved_outside_of_training(tmp_path: Path, change: dict[str, Any]) -> None:
    trainer = StandInTrainer(tmp_path, **change)
    trainer.run(ModelCheckpoint(save_last=None, every_n_train_steps=1), losses(1))
    assert trainer.saved == []


def test_to_yaml_and_last_checkpoints(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
    trainer = StandInTrainer(tmp_path)
    trainer.run(callback, losses(3, 1))
    callback.to_yaml()
    text = (tmp_path / "checkpoints" / "best_k_models.yaml").read_text()
    assert yaml.safe_load(text) == {path: float(score) for path, score in callback.best_k_models.items()}
    (tmp_path / "checkpoints" / "last-v1.ckpt").touch()
    (tmp_path / "checkpoints" / "lasting.ckpt").touch()
    assert {Path(path).name for path in callback._find_last_checkpoints(trainer)} == {
        "last.ckpt",
        "last-v1.ckpt",
    }
