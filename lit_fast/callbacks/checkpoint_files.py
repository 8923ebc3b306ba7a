"""What checkpoint files are called, where they are, and how they go."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_fast.callbacks.checkpoint import Checkpoint
from lit_fast.checkpoint.files import link
from lit_fast.errors import MisconfigurationException

_FIELD = re.compile(r"\{([^{}:]+)(:[^{}]*)?\}")


class CheckpointFiles(Checkpoint):
    """The half of `ModelCheckpoint` that deals with files; a subclass may override any of it."""

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    dirpath: str | None
    filename: str | None
    auto_insert_metric_name: bool
    _enable_version_counter: bool

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """The path that a template gives for these metrics.

        Args:
            metrics: values by name; a name that is missing becomes 0.
            filename: template to use instead of the callback's own.
            ver: version counter, appended as "-v<ver>".
            prefix: put before the name, joined by "-".

        Example::

            >>> ModelCheckpoint(filename="{epoch}-{val_loss:.2f}").format_checkpoint_name(
            ...     {"epoch": 2, "val_loss": 0.123})
            'epoch=2-val_loss=0.12.ckpt'
        """
        template = filename or self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"

        def value(match: re.Match[str]) -> str:
            name, spec = match[1], (match[2] or ":")[1:]
            label = name + self.CHECKPOINT_EQUALS_CHAR if self.auto_insert_metric_name else ""
            return label + format(metrics.get(name, torch.tensor(0)), spec)

        parts = [_FIELD.sub(value, template)]
        if prefix is not None:
            parts.insert(0, prefix)
        if ver is not None:
            parts.append(f"v{ver}")
        name = self.CHECKPOINT_JOIN_CHAR.join(parts) + self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: Any, del_filepath: str | None = None
    ) -> str:
        """The path of the next file; `del_filepath` will go, so its name is free."""
        return self._versioned_name(monitor_candidates, trainer, del_filepath or "")

    def _versioned_name(self, metrics: dict[str, Tensor], trainer: Any, own: str, filename: str | None = None) -> str:
        """A name that is free, or that of the file `own`, which may be overwritten."""

        def free_name() -> str:
            filepath = self.format_checkpoint_name(metrics, filename)
            version = self.STARTING_VERSION
            while self._enable_version_counter and filepath != own and self.file_exists(filepath, trainer):
                filepath = self.format_checkpoint_name(metrics, filename, ver=version)
                version += 1
            return filepath

        found: str = trainer.strategy.of_first(free_name)  # others would look while the first one writes
        return found

    def _resolve_ckpt_dir(self, trainer: Any) -> str:
        if self.dirpath is not None:
            return self.dirpath
        if not trainer.loggers:
            return os.path.join(trainer.default_root_dir, "checkpoints")
        logger = trainer.loggers[0]
        root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(root, str(logger.name), version, "checkpoints")

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """Paths of every `last.ckpt`, `last-v1.ckpt` ... in this callback's directory."""
        directory = self._resolve_ckpt_dir(trainer)
        pattern = re.compile(rf"{re.escape(self.CHECKPOINT_NAME_LAST)}(-.*)?{re.escape(self.FILE_EXTENSION)}")
        names = os.listdir(directory) if os.path.isdir(directory) else []
        return {os.path.normpath(os.path.join(directory, name)) for name in names if pattern.fullmatch(name)}

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Any) -> bool:
        """Whether a checkpoint of that name is there already."""
        return os.path.lexists(filepath)

    def _should_remove_checkpoint(self, trainer: Any, previous: str, current: str) -> bool:
        """Whether `previous` may go: it was not overwritten, is in our directory, and was not resumed from."""
        old = Path(previous).absolute()
        resumed = getattr(trainer, "ckpt_path", None)
        assert self.dirpath is not None
        ours = Path(self.dirpath).absolute() in old.parents
        return previous != current and ours and (resumed is None or Path(resumed).absolute() != old)

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        trainer.strategy.remove_checkpoint(filepath)

    @staticmethod
    def _link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            link(filepath, linkpath)


def local_path(dirpath: str | os.PathLike[str]) -> str:
    path = os.fspath(dirpath)
    if "://" in path and not path.startswith("file://"):
        raise MisconfigurationException(
            f"ModelCheckpoint(dirpath={path!r}): only local directories can be written so far."
        )
    return os.path.realpath(os.path.expanduser(path.removeprefix("file://")))
