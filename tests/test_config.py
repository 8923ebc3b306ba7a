"""Options of the Trainer: defaults, refusals, contradictions."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from heart_models import QUIET, Plain, batches, fitted, trainer

import lit_fast
from lit_fast import config
from lit_fast.callbacks import EarlyStopping
from lit_fast.errors import MisconfigurationException, PossibleUserWarning
from lit_fast.loggers import DummyLogger


@contextlib.contextmanager
def caplog_of_lit_fast(caplog: Any) -> Iterator[None]:
    """What the logger `lit_fast` says, which does not reach the root logger's handlers."""
    logger = logging.getLogger("lit_fast")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "lit_fast"):
        yield
    logger.removeHandler(caplog.handler)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_steps": -2}, "max_steps=-2.*at least -1"),
    ({"max_steps": 2.5}, "max_steps=2.5.*int"),
    ({"max_steps": True}, "max_steps=True"),
    ({"max_epochs": -3}, "max_epochs=-3"),
    ({"min_steps": -1}, "min_steps=-1"),
    ({"min_epochs": "1"}, "min_epochs='1'"),
    ({"limit_train_batches": -1}, "limit_train_batches=-1.*negative"),
    ({"limit_train_batches": 1.5}, "limit_train_batches=1.5.*fraction"),
    ({"limit_val_batches": "all"}, "limit_val_batches='all'"),
    ({"limit_val_batches": True}, "limit_val_batches=True"),
    ({"val_check_interval": 0}, "val_check_interval=0.*limit_val_batches=0"),
    ({"val_check_interval": 1.5}, "val_check_interval=1.5"),
    ({"val_check_interval": "10:00"}, "val_check_interval='10:00'.*DD:HH:MM:SS"),
    ({"val_check_interval": "00:00:ten:00"}, "val_check_interval='00:00:ten:00'.*DD:HH:MM:SS"),
    ({"val_check_interval": {"fortnights": 1}}, "val_check_interval=.*fortnights.*timedelta"),
    ({"max_time": "12 hours"}, "max_time='12 hours'.*DD:HH:MM:SS"),
    ({"max_time": 3}, "max_time=3.*DD:HH:MM:SS"),
    ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
    ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "val_check_interval must be an int"),
    ({"num_sanity_val_steps": -2}, "num_sanity_val_steps=-2"),
    ({"log_every_n_steps": -1}, "log_every_n_steps=-1"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
    ({"accumulate_grad_batches": {0: 2}}, "accumulate_grad_batches="),
    ({"gradient_clip_val": "1"}, "gradient_clip_val='1'"),
    ({"gradient_clip_val": True}, "gradient_clip_val=True"),
    ({"gradient_clip_val": float("nan")}, "gradient_clip_val=nan"),
    ({"gradient_clip_algorithm": "l2"}, "allowed are 'norm' and 'value'"),
    ({"precision": "int8"}, "precision='int8'.*unknown.*32-true"),
    ({"num_nodes": 2}, "num_nodes=2.*NODE_RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ({"num_nodes": "two"}, "num_nodes='two'.*at least 1"),
    ({"fast_dev_run": -1}, "fast_dev_run=-1.*number of batches"),
    ({"fast_dev_run": "yes"}, "fast_dev_run='yes'"),
    ({"deterministic": "always"}, "deterministic='always'.*'warn'"),
    ({"benchmark": 1}, "benchmark=1.*True, False"),
    ({"detect_anomaly": None}, "detect_anomaly=None.*True, False"),
    ({"inference_mode": "no"}, "inference_mode='no'"),
    ({"sync_batchnorm": 1}, "sync_batchnorm=1"),
    ({"use_distributed_sampler": "yes"}, "use_distributed_sampler='yes'"),
    ({"enable_checkpointing": "yes"}, "enable_checkpointing='yes'"),
    ({"model_registry": "team/model"}, "model_registry='team/model'.*litmodels.*best_model_path"),
    ({"default_root_dir": 3}, "default_root_dir=3.*path"),
    ({"profiler": "xla"}, "profiler='xla'.*not built.*'step'"),
    ({"callbacks": [object()]}, "object.*derives from lit_fast.Callback"),
    ({"callbacks": lit_fast.callbacks.ModelCheckpoint()}, "enable_checkpointing=False.*contradicts"),
    ({"max_epoch": 3}, "no option 'max_epoch'; did you mean max_epochs"),
    ({"zzz": 3}, "no option 'zzz'; there are: accelerator, .*val_check_interval"),
]


@pytest.mark.parametrize("options,message", WRONG, ids=[f"{i}-{','.join(o)}" for i, (o, _) in enumerate(WRONG)])
def test_wrong_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s){message}"):
        trainer(**options)


def test_defaults() -> None:
    made = trainer()
    assert (made.max_epochs, made.max_steps, made.min_epochs, made.min_steps) == (None, -1, None, None)
    assert (made.log_every_n_steps, made.num_sanity_val_steps, made.check_val_every_n_epoch) == (50, 2, 1)
    assert (made.limit_train_batches, made.limit_predict_batches, made.val_check_interval) == (1.0, 1.0, 1.0)
    assert (made.fast_dev_run, made.barebones, made.enable_autolog_hparams) == (False, False, True)
    assert trainer(num_sanity_val_steps=-1).num_sanity_val_steps == float("inf")
    assert made.precision == "32-true"
    assert trainer(precision=32).precision == "32-true"
    assert trainer(precision="bf16").precision == "bf16-mixed"
    assert trainer(gradient_clip_val=0).gradient_clip_val is None
    assert trainer(gradient_clip_algorithm="value").gradient_clip_algorithm == "value"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options,max_epochs,min_epochs",
    [
        ({"max_epochs": 3}, 3, 0),
        ({"max_epochs": -1, "max_steps": 1}, -1, 0),
        ({"max_steps": 1}, -1, 0),
        ({"max_epochs": 2, "min_steps": 1}, 2, 1),
        ({"max_epochs": 2, "min_epochs": 2}, 2, 2),
        ({"max_time": "00:00:00:00"}, -1, 0),
    ],
)
def test_limits_are_settled_by_a_fit(options: dict[str, Any], max_epochs: int, min_epochs: int) -> None:
    made = fitted(Plain(), batches(1), **options)
    assert (made.max_epochs, made.min_epochs) == (max_epochs, min_epochs)


def test_no_limit_means_1000_epochs_and_says_so() -> None:
    made = trainer(limit_train_batches=0)
    with pytest.warns(PossibleUserWarning, match="1000 epochs.*max_epochs=-1"):
        made.fit(Plain(), batches(1))
    assert made.max_epochs == 1000


@pytest.mark.parametrize("given", [True, 1, 3])
def test_fast_dev_run(given: int, tmp_path: Path, caplog: Any) -> None:
    class Counts(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))
            self.counts.append(("validation", self.trainer.sanity_checking))

        def on_train_batch_end(self, *args: Any) -> None:
            self.counts.append(("train", self.trainer.current_epoch))

    model, count = Counts(), int(given)
    model.counts = []
    early = EarlyStopping("never logged")
    with caplog_of_lit_fast(caplog):
        made = lit_fast.Trainer(
            accelerator="cpu", fast_dev_run=given, max_epochs=7, max_steps=9, num_sanity_val_steps=5, callbacks=[early],
            val_check_interval=1, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    made.fit(model, batches(8), [batches(8)])
    assert model.counts == [("train", 0)] * count + [("validation", False)] * count
    assert list(tmp_path.iterdir()) == [] and made.checkpoint_callback.best_model_path == ""
    assert isinstance(made.logger, DummyLogger) and made.fast_dev_run == (True if count == 1 else count)
    assert (made.max_epochs, made.max_steps, made.limit_test_batches) == (1, count, count)
    assert f"every loop runs {count} batch(es)" in caplog.text
    assert trainer(fast_dev_run=True).loggers == []  # logger=False stays


# -- barebones


@pytest.mark.parametrize("option", config.BAREBONES)
def test_barebones_refuses_what_takes_time(option: str) -> None:
    asked = {"log_every_n_steps": 5, "num_sanity_val_steps": 1, "profiler": "step"}.get(option, True)
    with pytest.raises(MisconfigurationException, match=f"barebones=True, {option}={asked!r}"):
        lit_fast.Trainer(barebones=True, **{option: asked})


def test_barebones(tmp_path: Path, caplog: Any) -> None:
    class Logs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    with caplog_of_lit_fast(caplog):
        made = lit_fast.Trainer(barebones=True, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path)
    assert "self.log does nothing" in caplog.text
    assert made.callbacks == made.loggers == [] and made.barebones
    assert (made.log_every_n_steps, made.num_sanity_val_steps) == (0, 0)
    model = Logs()
    with pytest.warns(UserWarning, match=r"self.log\('loss', ...\) does nothing under Trainer\(barebones=True\)"):
        made.fit(model, batches(3))
    assert len(model.losses) == 3 and made.callback_metrics == {} and list(tmp_path.iterdir()) == []


# -- PL_TRAINER_*


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "MAX_STEPS": "7", "LIMIT_TRAIN_BATCHES": "0.5", "ENABLE_CHECKPOINTING": "False", "ACCELERATOR": "cpu",
        "DEVICES": "[0]", "MIN_STEPS": "", "NOTHING": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    made = lit_fast.Trainer(enable_model_summary=False, enable_progress_bar=False, logger=False)
    assert (made.max_steps, made.limit_train_batches, made.min_steps) == (7, 0.5, None)
    assert made.checkpoint_callback is None
    assert lit_fast.Trainer(**QUIET, max_steps=3).max_steps == 3, "an argument goes before the environment"


def test_a_wrong_value_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "many")
    with pytest.raises(MisconfigurationException, match=r"max_steps='many'.*PL_TRAINER_MAX_STEPS='many'"):
        trainer()
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "5")
    with pytest.raises(MisconfigurationException, match="val_check_interval=0"):
        trainer(val_check_interval=0)


def test_the_signature_is_lightnings() -> None:
    assert list(inspect.signature(lit_fast.Trainer).parameters)[:4] == [
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
    ]


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        trainer().config.max_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "limit,length,expected",
    [(1.0, 10, 10), (0.5, 10, 5), (0.39, 10, 3), (3, 10, 3), (30, 10, 10), (0, 10, 0), (0.0, 10, 0),
     (1.0, None, None), (0.0, None, 0), (7, None, 7)],
)  # fmt: skip
def test_batch_limit(limit: float, length: int | None, expected: int | None) -> None:
    assert config.batch_limit("limit_train_batches", limit, length) == expected


def test_batch_limit_that_leaves_nothing() -> None:
    with pytest.raises(MisconfigurationException, match=r"less than one batch; use at least 0\.1"):
        config.batch_limit("limit_train_batches", 0.01, 10)
    with pytest.raises(MisconfigurationException, match="no length"):
        config.batch_limit("limit_train_batches", 0.5, None)
