"""TensorBoardLogger: what stands in the event files, read back with tensorboard's own reader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.loggers import TensorBoardLogger

pytest.importorskip("tensorboard")


def events(logger: TensorBoardLogger) -> list[Any]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    files = sorted(Path(logger.log_dir).glob("events.out.tfevents.*"))
    loaded = [Event.FromString(raw) for file in files for raw in RawEventFileLoader(str(file)).Load()]
    return [event for event in loaded if event.HasField("summary")]


def scalars(logger: TensorBoardLogger) -> list[tuple[int, dict[str, float]]]:
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events(logger)
        if all(value.HasField("simple_value") for value in event.summary.value)
    ]


def test_all_metrics_of_one_call_are_one_event(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="run")
    logger.log_metrics({"loss": torch.tensor(0.5), "lr": 0.25, "epoch": 3}, step=49)
    logger.log_metrics({"loss": 0.125}, step=99)
    logger.finalize("success")
    assert scalars(logger) == [
        (49, {"run-loss": 0.5, "run-lr": 0.25, "run-epoch": 3.0}),
        (99, {"run-loss": 0.125}),
    ]
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert (Path(logger.log_dir) / "hparams.yaml").read_text() == "{}\n"


def test_goes_on_in_a_new_file_after_finalize(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="again", filename_suffix=".x")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.finalize("failed")
    assert not (Path(logger.log_dir) / "hparams.yaml").exists()
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.finalize("success")
    assert sorted(scalars(logger)) == [(0, {"loss": 1.0}), (1, {"loss": 2.0})]


def test_the_experiment_writes_into_the_same_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, sub_dir="events")
    assert logger.log_dir == str(tmp_path / "version_0" / "events") and logger.sub_dir == "events"
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.experiment.add_text("note", "hello", 0)
    logger.finalize("success")
    assert len(list(Path(logger.log_dir).glob("events*"))) == 1
    tags = {value.tag for event in events(logger) for value in event.summary.value}
    assert tags == {"loss", "note/text_summary"}


def test_hyperparameters(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"width": 8, "net": {"act": "relu"}, "betas": (0.9, 0.99)})
    logger.log_hyperparams({"lr": 0.1}, metrics={"hp/score": 0.5})
    logger.log_hyperparams({"lr": 0.2}, metrics=2.0)
    logger.finalize("success")
    values = [pair for _, row in scalars(logger) for pair in row.items()]
    assert ("hp_metric", -1.0) in values and ("hp/score", 0.5) in values and ("hp_metric", 2.0) in values
    tags = [value.tag for event in events(logger) for value in event.summary.value]
    assert tags.count("_hparams_/session_start_info") == 3
    written = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert written == {"width": 8, "net": {"act": "relu"}, "betas": [0.9, 0.99], "lr": 0.2}

    silent = TensorBoardLogger(tmp_path, default_hp_metric=False)
    silent.log_hyperparams({"width": 8})
    silent.finalize("success")
    assert events(silent) == []


def test_a_value_that_is_no_number_is_an_error_that_names_it(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(ValueError, match=r"'name' = 'adam' \(str\)"):
        logger.log_metrics({"loss": 1.0, "name": "adam"}, step=0)
    logger.log_metrics({"both": {"train": 1.0, "val": 2.0}}, step=0)
    logger.finalize("success")


def test_the_graph_is_written_when_asked(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    silent = TensorBoardLogger(tmp_path)
    silent.log_graph(model)
    assert silent._experiment is None
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(UserWarning, match="example_input_array"):
        logger.log_graph(model)
    logger.log_graph(model, torch.zeros(1, 3))
    logger.finalize("success")
    data = b"".join(path.read_bytes() for path in Path(logger.log_dir).glob("events*"))
    assert b"aten::linear" in data


def test_nothing_is_imported_or_written_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert logger.version == 0 and list(tmp_path.iterdir()) == []
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MisconfigurationException, match="CSVLogger"):
        logger.log_metrics({"loss": 1.0}, step=0)


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    logger.log_hyperparams({"a": 1})
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_can_be_pickled(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    assert pickle.loads(pickle.dumps(logger)).version == 0
    logger.finalize("success")
