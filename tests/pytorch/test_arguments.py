"""Arguments of calls that are running, and of signatures: what Lightning 2.6.6 gave for the same programs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

import lit_fast
from lit_fast.pytorch import arguments


class Base:
    def __init__(self, width: int, *rest: Any, **options: Any) -> None:
        super().__init__()
        self.own = arguments.get_init_args(inspect.currentframe())  # type: ignore[arg-type]
        self.all = arguments.collect_init_args(inspect.currentframe(), [])  # type: ignore[arg-type]
        self.of_base = arguments.collect_init_args(
            inspect.currentframe(),  # type: ignore[arg-type]
            [],
            classes=(SimpleNamespace,),
        )


class Derived(Base):
    def __init__(self, depth: int, *, rate: float = 0.1) -> None:
        super().__init__(depth * 2, "ignored", name="a")


def test_arguments_of_every_init_that_called_another() -> None:
    made = Derived(3)
    assert made.own == {"width": 6, "name": "a"}
    assert made.all == [{"width": 6, "name": "a"}, {"depth": 3, "rate": 0.1}]
    assert made.of_base == []


def test_a_frame_outside_of_a_class_has_none() -> None:
    assert arguments.get_init_args(inspect.currentframe()) == {}  # type: ignore[arg-type]


def test_names_in_a_signature() -> None:
    assert arguments.parse_class_init_keys(Base) == ("self", "rest", "options")
    assert arguments.parse_class_init_keys(Derived) == ("self", None, None)


def test_hooks_that_take_a_parameter() -> None:
    takes = arguments.is_param_in_hook_signature
    assert takes(lambda dataloader_iter: 0, "dataloader_iter", explicit=True)
    assert takes(lambda *args: 0, "batch_idx") and not takes(lambda *args: 0, "batch_idx", explicit=True)
    assert takes(lambda a, b: 0, "batch_idx", min_args=2) and not takes(lambda self, b: 0, "batch_idx", min_args=2)


def test_what_cannot_be_pickled_is_dropped() -> None:
    values = {"width": 3, "function": lambda: 0}
    with pytest.warns(UserWarning, match="'function' cannot be pickled"):
        arguments.clean_namespace(values)
    assert values == {"width": 3}


def test_hyperparameters_of_another_object() -> None:
    class Model(lit_fast.LightningModule):
        def __init__(self, width: int, depth: int = 2) -> None:
            super().__init__()
            arguments.save_hyperparameters(self, ignore="depth")

    assert Model(4).hparams == {"width": 4}


def test_a_class_by_its_path() -> None:
    assert arguments.instantiate_class((), {"class_path": "collections.Counter", "init_args": {"a": 2}}) == {"a": 2}
