"""`save_hyperparameters`: which arguments are kept, and what reaches checkpoint and logger."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, trainer

from lit_fast.errors import MisconfigurationException


class Keeps(Plain):
    def __init__(self, width: int = 3, *, rate: float = 0.1, name: str = "a", **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class Child(Keeps):
    def __init__(self, depth: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Some(Plain):
    def __init__(self, width: int = 3, rate: float = 0.1, function: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters("width", "rate")


class Ignores(Plain):
    def __init__(self, width: int = 3, net: Any = None, other: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net", "other"])


class Takes(Plain):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.save_hyperparameters(config)


def test_all_arguments() -> None:
    assert Keeps(4, rate=0.5, extra=1).hparams == {"width": 4, "rate": 0.5, "name": "a", "extra": 1}


def test_a_subclass_adds_its_own() -> None:
    assert Child(depth=5, width=7).hparams == {"depth": 5, "width": 7, "rate": 0.1, "name": "a"}


def test_chosen_and_ignored() -> None:
    assert Some(4).hparams == {"width": 4, "rate": 0.1}
    assert Ignores(4, net=torch.nn.Linear(1, 1)).hparams == {"width": 4}


@pytest.mark.parametrize("given", [{"a": 1, "b": 2}, Namespace(a=1, b=2)])
def test_one_mapping(given: Any) -> None:
    model = Takes(given)
    assert model.hparams == {"a": 1, "b": 2} and model.hparams.a == 1
    assert model._hparams_name == "config"


def test_changes_are_kept_and_the_initial_ones_too() -> None:
    model = Keeps(4)
    model.hparams.width = 9
    model.hparams["new"] = 1
    assert model.hparams.width == 9 and model.hparams_initial.width == 4
    with pytest.raises(AttributeError, match="no hyperparameter 'wide'; there are: width"):
        _ = model.hparams.wide


def test_wrong_names_and_kinds() -> None:
    class Wrong(Plain):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters("widht")

    with pytest.raises(MisconfigurationException, match=r"'widht' is no argument of Wrong\.__init__; there are: width"):
        Wrong()
    with pytest.raises(MisconfigurationException, match="was given int"):
        Takes(3)


def test_in_the_checkpoint(tmp_path: Path) -> None:
    made = fitted(Keeps(4), batches(1), max_epochs=1)
    made.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert held["hyper_parameters"] == {"width": 4, "rate": 0.1, "name": "a"}
    assert held["hparams_name"] == "kwargs"
    assert Keeps.load_from_checkpoint(tmp_path / "a.ckpt", name="b").hparams == {"width": 4, "rate": 0.1, "name": "b"}


def test_what_would_need_pickle_is_left_out_and_named(tmp_path: Path) -> None:
    made = fitted(Keeps(4, function=print), batches(1), max_epochs=1)
    with pytest.warns(UserWarning, match="would execute pickled code: function"):
        made.save_checkpoint(tmp_path / "a.ckpt")
    assert "function" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]


def test_to_the_logger(tmp_path: Path) -> None:
    from lit_fast.loggers import CSVLogger

    seen: list[Any] = []

    class Remembers(CSVLogger):
        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(dict(params))

    trainer(max_epochs=1, logger=Remembers(tmp_path)).fit(Keeps(4), batches(1))
    trainer(max_epochs=1, logger=Remembers(tmp_path), enable_autolog_hparams=False).fit(Keeps(5), batches(1))
    assert seen == [{"width": 4, "rate": 0.1, "name": "a"}]
