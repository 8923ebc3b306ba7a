"""`save_hyperparameters`: which arguments are kept, and what reaches checkpoint and logger."""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from argparse import Namespace
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, trainer

import lit_fast
from lit_fast.errors import CheckpointError, MisconfigurationException
from lit_fast.hparams import AttributeDict


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


@pytest.mark.parametrize("weights", [False, True])
def test_what_needs_pickle_is_kept_apart_for_who_trusts_the_file(weights: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    made = fitted(Keeps(4, function=print), batches(1), max_epochs=1)
    with pytest.warns(UserWarning, match="would execute pickled code: function"):
        made.save_checkpoint(path, weights_only=weights)
    held = torch.load(path, weights_only=True)
    assert "function" not in held["hyper_parameters"]
    with pytest.warns(UserWarning, match=r"without the hyperparameters function, .*weights_only=False") as heard:
        assert "function" not in Keeps.load_from_checkpoint(path).hparams
    assert heard[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Keeps.load_from_checkpoint(path, function=len).hparams.function is len
        again = Keeps.load_from_checkpoint(path, weights_only=False)
        assert again.hparams == {"width": 4, "rate": 0.1, "name": "a", "function": print}
        assert Keeps.load_from_checkpoint(path, weights_only=False, function=len).hparams.function is len


def test_what_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    made = fitted(Keeps(4, function=lambda: None), batches(1), max_epochs=1)
    with pytest.warns(UserWarning, match="cannot be pickled: function"):
        made.save_checkpoint(tmp_path / "a.ckpt")
    assert Keeps.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False).hparams == {
        "width": 4,
        "rate": 0.1,
        "name": "a",
    }


def test_pickled_code_that_is_gone_is_named(tmp_path: Path) -> None:
    made = fitted(Keeps(4, function=print), batches(1), max_epochs=1)
    with pytest.warns(UserWarning, match="function"):
        made.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    code = torch.frombuffer(bytearray(b"cgone\nmissing\n."), dtype=torch.uint8)
    held["lit_fast"]["pickled_hyper_parameters"]["hyper_parameters"]["function"] = code
    torch.save(held, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"'function' cannot be unpickled.*function=\.\.\."):
        Keeps.load_from_checkpoint(tmp_path / "b.ckpt", weights_only=False)


def test_to_the_logger(tmp_path: Path) -> None:
    from lit_fast.loggers import CSVLogger

    seen: list[Any] = []

    class Remembers(CSVLogger):
        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(dict(params))

    trainer(max_epochs=1, logger=Remembers(tmp_path)).fit(Keeps(4), batches(1))
    trainer(max_epochs=1, logger=Remembers(tmp_path), enable_autolog_hparams=False).fit(Keeps(5), batches(1))
    assert seen == [{"width": 4, "rate": 0.1, "name": "a"}]


class Base(lit_fast.LightningModule):
    def __init__(self, a: int = 1, b: int = 2, **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class Above(Base):
    """Its own `a` wins over what it hands to its base."""

    def __init__(self, a: int = 5, c: int = 3) -> None:
        super().__init__(a=a + 1)


class Drops(Base):
    def __init__(self, a: int = 5, c: int = 3) -> None:
        super().__init__(a=a + 1)
        self.save_hyperparameters(ignore=["b"])


class Adds(Base):
    def __init__(self, a: int = 5, c: int = 3) -> None:
        super().__init__(a=a + 1)
        self.save_hyperparameters("c", logger=False)


class InAMethod(lit_fast.LightningModule):
    def __init__(self, a: int = 1) -> None:
        super().__init__()
        self.keep(7)

    def keep(self, unrelated: int) -> None:
        self.save_hyperparameters()


class Holds(lit_fast.LightningModule):
    """A module inside another one keeps its own arguments only."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.inner = Base(a=33)
        self.save_hyperparameters()


class ByFrame(lit_fast.LightningModule):
    def __init__(self, a: int = 1) -> None:
        super().__init__()
        keep_for(self, inspect.currentframe())


def keep_for(module: Any, frame: Any) -> None:
    module.save_hyperparameters(frame=frame)


@dataclass(eq=False)
class AsDataclass(lit_fast.LightningModule):
    a: int = 1
    b: int = 2

    def __post_init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    "make,expected",
    [
        (Above, {"a": 5, "b": 2, "c": 3}),
        (Drops, {"a": 5, "c": 3}),
        (Adds, {"a": 5, "b": 2, "c": 3}),
        (InAMethod, {"a": 1}),
        (Holds, {"depth": 1}),
        (lambda: Holds().inner, {"a": 33, "b": 2}),
        (ByFrame, {"a": 1}),
        (AsDataclass, {"a": 1, "b": 2}),
    ],
)
def test_whose_arguments(make: Any, expected: dict[str, Any]) -> None:
    model = make()
    assert model.hparams == model.hparams_initial == expected
    assert model._log_hyperparams is (make is not Adds)


def test_the_initial_ones_are_a_copy() -> None:
    given = [0]
    model = Base(a=given)  # type: ignore[arg-type]
    given.append(1)
    model.hparams_initial["b"] = 7
    assert model.hparams.a == [0, 1] and model.hparams_initial == {"a": [0], "b": 2}


def test_a_module_among_them_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"'a' is a torch.nn.Module.*ignore=\['a'\]"):
        Base(a=torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_setting_and_forgetting() -> None:
    model = Base()
    with pytest.raises(AttributeError):
        model.hparams = {}  # type: ignore[misc]
    model._set_hparams(Namespace(c=3))
    model.remove_ignored_hparams(["a", "unknown"])
    del model.hparams.b
    assert model.hparams == {"c": 3} and Plain().hparams == {} and Plain().hparams_initial == {}
    assert repr(Base(b="x").hparams) == '"a": 1\n"b": x'  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", [None, {}, Namespace()])
def test_nothing_to_keep(nothing: Any) -> None:
    assert Takes(nothing).hparams == {}


class Color(str, Enum):
    RED = "red"


RICH: dict[str, Any] = {
    "path": Path("a/b"),
    "options": Namespace(depth=1, inner=Namespace(names=["x"])),
    "nested": AttributeDict(a=AttributeDict(b=(1, 2))),
    "color": Color.RED,
    "numbers": [1.5, {"k": {1, 2}}],
}


def checkpoint_of(model: Any, path: Path, **options: Any) -> Path:
    fitted(model, batches(1), max_epochs=1, **options).save_checkpoint(path)
    return path


def test_rich_values_are_saved_as_data(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    path = checkpoint_of(Keeps(numpy.int64(3), rate=numpy.float64(0.5), **RICH), tmp_path / "a.ckpt")
    model = Keeps.load_from_checkpoint(path)
    assert model.hparams == {"width": 3, "rate": 0.5, "name": "a", **RICH}
    assert model.hparams.nested.a.b == (1, 2) and model.hparams.options.inner.names == ["x"]
    assert type(model.hparams.rate) is float and type(model.hparams.numbers[1]) is dict


@pytest.mark.parametrize("home", ["lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing"])
def test_a_file_with_lightnings_own_classes(tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lightning writes them: a dictionary of its class, a Namespace and a path, pickled by their names."""
    kind = type("AttributeDict", (dict,), {"__module__": home})
    parts = home.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[home].AttributeDict = kind  # type: ignore[attr-defined]
    hparams = {"width": 5, "more": kind(a=kind(b=1)), "options": Namespace(c=2), "path": Path("x")}
    held = {"state_dict": Plain().state_dict(), "hyper_parameters": hparams, "hparams_name": "kwargs"}
    torch.save(held, tmp_path / "a.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    model = Keeps.load_from_checkpoint(tmp_path / "a.ckpt")
    assert model.hparams.more.a.b == 1 and model.hparams.options.c == 2 and model.hparams.path == Path("x")


def test_one_dictionary_comes_back_under_its_name(tmp_path: Path) -> None:
    path = checkpoint_of(Takes(Namespace(a=1, b=2)), tmp_path / "a.ckpt")
    assert Takes.load_from_checkpoint(path, b=7).hparams == {"a": 1, "b": 7}
    assert Takes.load_from_checkpoint(path, config={"c": 1}).hparams == {"c": 1}


@pytest.mark.parametrize(
    "name,text", [("h.yaml", "width: 8\nrate: 0.25\n"), ("h.csv", "key,value\nwidth,8\nrate,0.25\n")]
)
def test_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    path = checkpoint_of(Keeps(4), tmp_path / "a.ckpt")
    (tmp_path / name).write_text(text)
    model = Keeps.load_from_checkpoint(path, hparams_file=tmp_path / name, name="b")
    assert model.hparams == {"width": 8, "rate": 0.25, "name": "b"}
    for wrong in ("h.txt", "absent.yaml"):
        with pytest.raises(MisconfigurationException, match=wrong):
            Keeps.load_from_checkpoint(path, hparams_file=tmp_path / wrong)


def test_how_the_command_line_would_build_it_is_not_followed(tmp_path: Path) -> None:
    hparams = {"width": 5, "_instantiator": "os.system", "_class_path": "x"}
    torch.save({"state_dict": Plain().state_dict(), "hyper_parameters": hparams}, tmp_path / "a.ckpt")
    assert Keeps.load_from_checkpoint(tmp_path / "a.ckpt").hparams == {"width": 5, "rate": 0.1, "name": "a"}


class Grows(Plain):
    """Its layers are made in configure_model."""

    def configure_model(self) -> None:
        self.more = torch.nn.Linear(2, 2)


def test_strict_and_configure_model(tmp_path: Path) -> None:
    path = checkpoint_of(Grows(), tmp_path / "a.ckpt")
    weight = Grows.load_from_checkpoint(path).more.weight
    assert torch.equal(weight, torch.load(path, weights_only=True)["state_dict"]["more.weight"])
    with pytest.raises(CheckpointError, match="2 keys are unknown"):
        Plain.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match=r"in part: 2 keys are unknown to the model \(more.bias, more.weight\)"):
        Plain.load_from_checkpoint(path, strict=False)

    class Loose(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False

    with pytest.raises(ValueError, match="contradicts"):
        Loose.load_from_checkpoint(path, strict=True)
    assert Plain().strict_loading is True and Loose().strict_loading is False


def test_only_on_the_class() -> None:
    for owner in (Plain(), lit_fast.LightningDataModule()):
        with pytest.raises(TypeError, match="load_from_checkpoint was called on an instance"):
            owner.load_from_checkpoint("a.ckpt")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = checkpoint_of(Plain(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"Takes cannot be built from .*config.*save_hyperparameters\(\)"):
        Takes.load_from_checkpoint(path)


def test_hparams_written_to_without_save_hyperparameters_go_through_a_checkpoint(tmp_path: Path) -> None:
    class Own(Plain):
        def __init__(self, **given: Any) -> None:
            super().__init__()
            self.hparams.update(given)

    fit = trainer(max_steps=1)
    fit.fit(Own(width=3), batches(1))
    fit.save_checkpoint(tmp_path / "own.ckpt")
    assert Own.load_from_checkpoint(tmp_path / "own.ckpt").hparams == {"width": 3}
