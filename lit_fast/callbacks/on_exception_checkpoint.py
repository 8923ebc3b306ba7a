"""Save a checkpoint when a run ends by an exception."""

from __future__ import annotations

import os
from typing import Any

from lit_fast.callbacks.checkpoint import Checkpoint
from lit_fast.checkpoint.files import remove
from lit_fast.errors import MisconfigurationException


class OnExceptionCheckpoint(Checkpoint):
    """Writes `dirpath/filename.ckpt` when an exception (Ctrl-C too) ends the run; a run that ends well removes it.

    A file that stands there is overwritten.

    Args:
        dirpath: directory of the file.
        filename: its name, without ".ckpt".

    Raises:
        MisconfigurationException: an empty `filename`.

    Example::

        rescue = OnExceptionCheckpoint("checkpoints")
        trainer = Trainer(callbacks=[rescue])
        trainer.fit(model, ckpt_path=rescue.ckpt_path if os.path.exists(rescue.ckpt_path) else None)
    """

    reads_gradients = False

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        super().__init__()
        if not filename:
            raise MisconfigurationException(
                f"OnExceptionCheckpoint(filename={filename!r}): the file needs a name; leave it out for 'on_exception'."
            )
        self.dirpath = dirpath
        self.filename = filename

    @property
    def ckpt_path(self) -> str:
        """The file that an exception writes."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.ckpt_path)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero:
            remove(self.ckpt_path)
