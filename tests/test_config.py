"""Options of the Trainer: defaults, refusals, contradictions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from heart_models import trainer

import lit_fast
from lit_fast import config
from lit_fast.errors import MisconfigurationException

ASKS_FOR_SOMETHING: dict[str, Any] = {
    "strategy": "ddp",
    "num_nodes": 2,
    "fast_dev_run": True,
    "max_time": "00:12:00:00",
    "limit_test_batches": 3,
    "limit_predict_batches": 0.5,
    "overfit_batches": 1,
    "deterministic": True,
    "benchmark": True,
    "use_distributed_sampler": "yes",
    "detect_anomaly": True,
    "barebones": True,
    "plugins": [object()],
    "sync_batchnorm": True,
    "reload_dataloaders_every_n_epochs": 1,
    "model_registry": "name",
    "suggest_integrations": "no",
}


def test_every_option_that_is_not_built_is_in_this_test() -> None:
    assert set(ASKS_FOR_SOMETHING) == set(config.NOT_YET)


@pytest.mark.parametrize("name", config.NOT_YET)
def test_not_built_yet_is_refused_by_name(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"Trainer\({name}=.*not built yet"):
        trainer(**{name: ASKS_FOR_SOMETHING[name]})


@pytest.mark.parametrize("name", config.NOT_YET)
def test_asking_for_nothing_is_accepted(name: str) -> None:
    for value in config.NOT_YET[name]:
        trainer(**{name: value})


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
    ({"val_check_interval": "00:00:10:00"}, "intervals in time are not built yet"),
    ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
    ({"check_val_every_n_epoch": None}, "val_check_interval must be an int"),
    ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "val_check_interval must be an int"),
    ({"num_sanity_val_steps": -2}, "num_sanity_val_steps=-2"),
    ({"log_every_n_steps": -1}, "log_every_n_steps=-1"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
    ({"accumulate_grad_batches": {0: 2}}, "accumulate_grad_batches="),
    ({"gradient_clip_val": "1"}, "gradient_clip_val='1'"),
    ({"gradient_clip_val": True}, "gradient_clip_val=True"),
    ({"gradient_clip_algorithm": "l2"}, "allowed are 'norm' and 'value'"),
    ({"precision": "16-mixed"}, "precision='16-mixed'.*not built yet.*bf16-mixed"),
    ({"precision": "int8"}, "precision='int8'.*unknown.*32-true"),
    ({"accelerator": "tpu"}, "accelerator='tpu'.*'cpu'"),
    ({"devices": 2}, "devices=2.*not built yet"),
    ({"devices": [0, 1]}, r"devices=\[0, 1\].*one device"),
    ({"profiler": "pytorch"}, "profiler='pytorch'.*'step'"),
    ({"callbacks": [object()]}, "object.*derives from lit_fast.Callback"),
    ({"callbacks": lit_fast.callbacks.ModelCheckpoint()}, "enable_checkpointing=False.*contradicts"),
    ({"max_epoch": 3}, "no option 'max_epoch'; did you mean max_epochs"),
    ({"zzz": 3}, "no option 'zzz'; there are: accelerator, .*val_check_interval"),
]


@pytest.mark.parametrize("options,message", WRONG, ids=[f"{i}-{','.join(o)}" for i, (o, _) in enumerate(WRONG)])
def test_wrong_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s){message}"):
        trainer(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_without_one() -> None:
    with pytest.raises(MisconfigurationException, match="sees no CUDA device"):
        trainer(accelerator="gpu")


def test_defaults() -> None:
    made = trainer()
    assert (made.max_epochs, made.max_steps) == (1000, -1)
    assert trainer(max_steps=5).max_epochs == -1
    assert made.config.log_every_n_steps == 50
    assert made.config.num_sanity_val_steps == 2
    assert trainer(min_epochs=2000).max_epochs == 2000
    assert made.precision == "32-true"
    assert trainer(precision=32).precision == "32-true"
    assert trainer(precision="bf16").precision == "bf16-mixed"
    assert trainer(gradient_clip_val=0).config.gradient_clip_val is None
    assert trainer(gradient_clip_algorithm="value").config.gradient_clip_algorithm == "value"


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
