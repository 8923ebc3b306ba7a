"""The loggers and callbacks that a Trainer has without being told, and those that installed packages add."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from heart_models import Plain, batches, fitted, trainer

import lit_fast
from lit_fast import defaults
from lit_fast.callbacks import ModelCheckpoint, Timer
from lit_fast.errors import MisconfigurationException
from lit_fast.loggers import CSVLogger, DummyLogger


@pytest.mark.parametrize("given", ["00:00:02:00", timedelta(minutes=2), {"minutes": 2}])
def test_max_time_is_a_timer(given: Any) -> None:
    made = trainer(max_time=given)
    (timer,) = made.callbacks
    assert isinstance(timer, Timer) and timer.time_remaining() == 120
    assert len(trainer(max_time=given, callbacks=[Timer("00:00:01:00")]).callbacks) == 1, "the given one stays"


def test_a_fit_ends_when_its_time_is_up() -> None:
    made = fitted(Plain(), batches(3), max_time=timedelta(0))
    assert (made.global_step, made.max_epochs, made.should_stop) == (0, -1, True)
    made = fitted(Plain(), batches(3), max_time=timedelta(0), min_steps=2)
    assert made.global_step == 3, "min_steps goes before max_time, and asks for an epoch at least"


def test_callbacks_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed(lit_fast.Callback): ...

    class Factory:
        name = "package.callbacks"

        def __init__(self, made: Any) -> None:
            self.made = made

        def load(self) -> Any:
            return lambda: self.made

    first, second, best = Installed(), Installed(), ModelCheckpoint()
    asked: list[str] = []
    monkeypatch.setattr(
        defaults, "entry_points", lambda group: asked.append(group) or [Factory([first]), Factory(second)]
    )
    defaults._factories.cache_clear()
    try:
        made = lit_fast.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[best]
        )
    finally:
        defaults._factories.cache_clear()
    assert made.callbacks == [first, second, best] and asked == ["lightning.pytorch.callbacks_factory"]


def test_forms_of_loggers(tmp_path: Path) -> None:
    one, two = CSVLogger(tmp_path), DummyLogger()
    assert trainer(logger=one).loggers == [one]
    assert trainer(logger=(one, two)).loggers == trainer(logger=iter([one, two])).loggers == [one, two]
    assert trainer(logger=[]).loggers == trainer(logger=False).loggers == []
    assert len(trainer(logger=True, default_root_dir=tmp_path).loggers) == 1
    for wrong in (3, "csv", [one, 3]):
        with pytest.raises(MisconfigurationException, match=r"logger=...\) was given .*lit_fast.loggers.Logger"):
            trainer(logger=wrong)


def test_callbacks_of_the_module_take_the_place_of_the_trainers() -> None:
    class Base(lit_fast.Callback): ...

    class Derived(Base): ...

    class Other(lit_fast.Callback): ...

    class Brings(Plain):
        def configure_callbacks(self) -> Any:
            return [own]

    own, other = Derived(), Other()
    made = fitted(Brings(), batches(1), max_epochs=1, callbacks=[Base(), other])
    assert made.callbacks == [other, own], "a callback of a derived class replaces one of its base, as in Lightning"
