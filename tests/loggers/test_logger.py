"""The base class, the logger that does nothing, and the one that is chosen by default."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import lit_fast.loggers as loggers
from lit_fast.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger, default_logger
from lit_fast.loggers.utilities import flatten, next_version, primitives, to_plain, write_yaml


def test_the_package_is_lazy_complete_and_sorted() -> None:
    assert loggers.__all__ == sorted(loggers.__all__) == sorted(loggers._HOME)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = loggers.Nothing


def test_a_logger_needs_a_name_a_version_and_two_methods() -> None:
    assert Logger.__abstractmethods__ == {"name", "version", "log_metrics", "log_hyperparams"}

    class Mine(Logger):
        saved = 0

        @property
        def name(self) -> str:
            return "mine"

        @property
        def version(self) -> int:
            return 1

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            pass

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

        def save(self) -> None:
            self.saved += 1

    logger = Mine()
    logger.finalize("success")
    assert (logger.saved, logger.root_dir, logger.log_dir, logger.save_dir, logger.group_separator) == (
        1, None, None, None, "/",
    )  # fmt: skip


def test_a_dummy_takes_every_call() -> None:
    logger = DummyLogger()
    assert (logger.name, logger.version) == ("", "")
    logger.log_metrics({"a": 1}, step=2)
    logger.anything(1, b=2)
    logger[3].experiment.add_image("x")
    logger.experiment[0] = 1
    with pytest.raises(AttributeError):
        _ = logger.__deepcopy__


@pytest.mark.parametrize(("found", "expected"), [(True, TensorBoardLogger), (None, CSVLogger)])
def test_the_default_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any, expected: type[Logger]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    before = "tensorboard" in sys.modules
    logger = default_logger(tmp_path)
    assert type(logger) is expected and logger.save_dir == str(tmp_path)
    assert ("tensorboard" in sys.modules) == before


def test_versions(tmp_path: Path) -> None:
    assert next_version(str(tmp_path / "missing")) == next_version(str(tmp_path)) == 0
    for name in ("version_2", "version_10", "version_x", "other_99"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_50").touch()
    assert next_version(str(tmp_path)) == 11


def test_hyperparameters_as_plain_data(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    yaml = pytest.importorskip("yaml")
    params = {
        "width": 8, "lr": 1e-3, "path": Path("a/b"), "dtype": torch.float32, "betas": (0.9, 0.99),
        "none": None, "tensor": torch.tensor([1, 2]), "net": {"layers": [{"n": 1}, {"n": 2}]},
        "fn": len, "yes": True,
    }  # fmt: skip
    assert flatten(params)["net/layers/1/n"] == 2
    assert primitives({"t": torch.tensor(2), "l": [1], "s": "x"}) == {"t": 2, "l": "[1]", "s": "x"}
    write_yaml(tmp_path / "h.yaml", params)
    assert yaml.safe_load((tmp_path / "h.yaml").read_text()) == to_plain(params)
    assert to_plain(params)["betas"] == [0.9, 0.99] and to_plain(params)["dtype"] == "torch.float32"
    write_yaml(tmp_path / "h.yaml", {})
    assert (tmp_path / "h.yaml").read_text() == "{}\n"
