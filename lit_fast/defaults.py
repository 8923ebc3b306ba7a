"""The loggers and callbacks of a Trainer: the user's, and the default ones where nothing else was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException

if TYPE_CHECKING:
    from lit_fast.config import TrainerConfig


def configure_loggers(given: Any, root: Path) -> list[Any]:
    """The loggers that `Trainer(logger=...)` asks for: True or None for the default one, False for none."""
    if given is False:
        return []
    if given is True or given is None:
        from lit_fast.loggers import default_logger

        return [default_logger(root)]
    return list(given) if isinstance(given, Iterable) else [given]


def configure_callbacks(given: Any, config: TrainerConfig) -> list[Callback]:
    """The user's callbacks and the default ones, checkpoint callbacks last.

    Raises:
        MisconfigurationException: something that is no callback, or one that contradicts a switched-off default.
    """
    callbacks: list[Any] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"Trainer(callbacks=...) was given {type(callback).__name__}; "
                f"a callback derives from lit_fast.Callback."
            )
    from lit_fast.callbacks.checkpoint import Checkpoint

    has_checkpoint = any(isinstance(callback, Checkpoint) for callback in callbacks)
    if has_checkpoint and not config.enable_checkpointing:
        raise MisconfigurationException(
            "Trainer(enable_checkpointing=False) contradicts the checkpoint callback in callbacks; drop one of them."
        )
    if config.enable_checkpointing and not has_checkpoint:
        from lit_fast.callbacks.model_checkpoint import ModelCheckpoint

        callbacks.append(ModelCheckpoint())
    if config.enable_progress_bar and not _has_kind(callbacks, "ProgressBar"):
        from lit_fast.callbacks.progress import RichProgressBar

        callbacks.append(RichProgressBar())
    if config.enable_model_summary and not _has_kind(callbacks, "ModelSummary"):
        from lit_fast.callbacks.model_summary import RichModelSummary

        callbacks.append(RichModelSummary())
    return checkpoints_last(callbacks)


def _has_kind(callbacks: list[Any], name: str) -> bool:
    """By the name of a base class: asking for the class itself would import rich for nothing."""
    return any(base.__name__ == name for callback in callbacks for base in type(callback).__mro__)


def checkpoints_last(callbacks: list[Any]) -> list[Any]:
    return sorted(callbacks, key=lambda callback: any(base.__name__ == "Checkpoint" for base in type(callback).__mro__))
