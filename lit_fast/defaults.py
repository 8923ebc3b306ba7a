"""The loggers and callbacks of a Trainer: the user's, and the default ones where nothing else was asked for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException
from lit_fast.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lit_fast.config import TrainerConfig

# Installed packages name functions here that return callbacks for every Trainer.
FACTORIES = "lightning.pytorch.callbacks_factory"


def configure_loggers(given: Any, root: Path, fast_dev_run: int | bool = False) -> list[Any]:
    """The loggers that `Trainer(logger=...)` asks for: True or None for the default one, False for none.

    Raises:
        MisconfigurationException: something that is no logger.
    """
    if given is False:
        return []
    wanted = [given] if given is True or given is None or not isinstance(given, Iterable) else list(given)
    for logger in wanted:
        if not isinstance(logger, bool | None) and not callable(getattr(logger, "log_metrics", None)):
            raise MisconfigurationException(
                f"Trainer(logger=...) was given {logger!r}; allowed are a logger (it derives from "
                f"lit_fast.loggers.Logger), a list of them, True for the default one, and False for none."
            )
    if fast_dev_run and wanted:
        from lit_fast.loggers import DummyLogger

        return [DummyLogger()]
    if given is True or given is None:
        from lit_fast.loggers import default_logger

        return [default_logger(root)]
    return wanted


def configure_callbacks(given: Any, config: TrainerConfig) -> list[Callback]:
    """The user's callbacks and the default ones, checkpoint callbacks last.

    Raises:
        MisconfigurationException: something that is no callback, one that contradicts a switched-off default, or two
            whose states could not be told apart in a checkpoint.
    """
    callbacks: list[Any] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"Trainer(callbacks=...) was given {_spelled(callback)}; a callback derives from lit_fast.Callback."
            )
    if config.enable_checkpointing and not _kinds(callbacks, "Checkpoint"):
        from lit_fast.callbacks.model_checkpoint import ModelCheckpoint

        callbacks.append(ModelCheckpoint())
    elif not config.enable_checkpointing:
        _refuse(callbacks, "Checkpoint", "enable_checkpointing", "checkpoint callback")
    if config.max_time is not None:
        callbacks += _timer(config.max_time, callbacks)
    bars = _kinds(callbacks, "ProgressBar")
    if len(bars) > 1:
        raise MisconfigurationException(
            f"Trainer(callbacks=...) holds several progress bars ({', '.join(bars)}); a terminal shows one: keep one."
        )
    if config.enable_progress_bar and not bars:
        from lit_fast.callbacks.progress import RichProgressBar

        callbacks.append(RichProgressBar())
    elif not config.enable_progress_bar:
        _refuse(callbacks, "ProgressBar", "enable_progress_bar", "progress bar")
    if config.enable_model_summary and not _kinds(callbacks, "ModelSummary"):
        from lit_fast.callbacks.model_summary import RichModelSummary

        callbacks.append(RichModelSummary())
    callbacks += _installed_callbacks()
    check_state_keys(callbacks)
    return in_order(callbacks)


def _timer(max_time: Any, callbacks: list[Any]) -> list[Any]:
    from lit_fast.callbacks.timer import Timer

    if any(isinstance(callback, Timer) for callback in callbacks):
        rank_zero_info("Trainer(max_time=...) is not used: there is a Timer among the callbacks already.")
        return []
    return [Timer(duration=max_time, interval="step")]


def _installed_callbacks() -> list[Any]:
    """Callbacks that installed packages add to every Trainer."""
    found: list[Any] = []
    for factory in _factories(tuple(sys.path)):
        made = factory.load()()
        found += made if isinstance(made, list) else [made]
        rank_zero_info("Callbacks of %s were added: %s.", factory.name, ", ".join(map(_spelled, found)))
    return found


@functools.cache
def _factories(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What the packages on `path` (sys.path) have; kept, for reading them all takes some 6 ms."""
    return tuple(entry_points(group=FACTORIES))


def check_state_keys(callbacks: list[Any]) -> None:
    """Raises: MisconfigurationException where two callbacks that keep state would use one name in a checkpoint."""
    seen: set[str] = set()
    for callback in callbacks:
        if type(callback).state_dict is Callback.state_dict:
            continue
        if callback.state_key in seen:
            raise MisconfigurationException(
                f"Two callbacks have the state_key {callback.state_key!r}, so a checkpoint could hold the state of one "
                f"only. Give {type(callback).__name__} a state_key that tells them apart, or drop one."
            )
        seen.add(callback.state_key)


def _refuse(callbacks: list[Any], kind: str, option: str, what: str) -> None:
    for found in _kinds(callbacks, kind):
        raise MisconfigurationException(
            f"Trainer({option}=False) contradicts the {what} in callbacks ({found}); drop one of them."
        )


def _spelled(value: Any) -> str:
    return f"the class {value.__name__}, not an instance of it" if isinstance(value, type) else type(value).__name__


def is_kind(made: Any, *names: str) -> bool:
    """Whether its class, or a base of it, has one of these names; the class itself would import rich for nothing."""
    return any(base.__name__ in names for base in type(made).__mro__)


def _kinds(callbacks: list[Any], name: str) -> list[str]:
    return [type(callback).__name__ for callback in callbacks if is_kind(callback, name)]


def in_order(callbacks: list[Any]) -> list[Any]:
    """Tuners first, checkpoint callbacks last, all others as they were given."""

    def place(callback: Any) -> int:
        return is_kind(callback, "Checkpoint") - is_kind(callback, "BatchSizeFinder", "LearningRateFinder")

    return sorted(callbacks, key=place)
