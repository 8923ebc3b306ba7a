"""CSVLogger: columns, versions, when it writes."""

from __future__ import annotations

import csv
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from lit_fast.loggers import CSVLogger


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_writes_metrics_and_hyperparameters(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    logger = CSVLogger(tmp_path, prefix="run")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    logger.log_hyperparams(Namespace(width=3))
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 1}, step=10)
    logger.finalize("success")
    assert rows(logger) == [{"run-epoch": "1", "run-loss": "0.5", "step": "10"}]
    assert yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text()) == {"width": 3}


def test_a_new_column_fills_up_the_old_rows(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    logger.log_metrics({"loss": 2.0, "acc": 0.25}, step=1)
    logger.log_metrics({"acc": 0.5}, step=2)
    logger.save()
    assert rows(logger) == [
        {"acc": "", "loss": "1.0", "step": "0"},
        {"acc": "0.25", "loss": "2.0", "step": "1"},
        {"acc": "0.5", "loss": "", "step": "2"},
    ]
    assert sorted(path.name for path in Path(logger.log_dir).iterdir()) == ["metrics.csv"]


def test_goes_on_after_finalize(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step=step)
        logger.finalize("success")
        assert logger.experiment._file is None
    assert [row["step"] for row in rows(logger)] == ["0", "1", "2"]


@pytest.mark.parametrize(("every", "interval", "written"), [(10, 1, 10), (10, 3, 4), (100, 50, 0), (5, 7, 2)])
def test_writes_whenever_a_full_interval_has_passed(tmp_path: Path, every: int, interval: int, written: int) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=every)
    for step in range(interval - 1, 18, interval):
        logger.log_metrics({"loss": 1.0}, step=step)
    path = Path(logger.log_dir) / "metrics.csv"
    assert (len(rows(logger)) if path.exists() else 0) == written


def test_steps_count_themselves_where_none_is_given(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for _ in range(3):
        logger.log_metrics({"loss": 1.0})
    logger.save()
    assert [row["step"] for row in rows(logger)] == ["0", "1", "2"]


def test_versions_and_names(tmp_path: Path) -> None:
    for expected in (0, 1):
        logger = CSVLogger(tmp_path, name="gpt")
        logger.log_metrics({"a": 1}, 0)
        assert logger.version == expected and logger.name == "gpt"
    named = CSVLogger(tmp_path, name=None, version="mine")
    assert named.log_dir == str(tmp_path / "mine") and named.root_dir == f"{tmp_path}/"
    named.log_metrics({"a": 1}, 0)
    named.save()
    with pytest.warns(UserWarning, match="another `version`"):
        again = CSVLogger(tmp_path, name="", version="mine")
        again.log_metrics({"b": 2}, 0)
    again.save()
    assert rows(again) == [{"b": "2", "step": "0"}]


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    logger.log_hyperparams({"a": 1})
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_can_be_pickled(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    logger.save()
    assert pickle.loads(pickle.dumps(logger)).version == 0
