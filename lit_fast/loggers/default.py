"""The logger of a Trainer that was not told which."""

from __future__ import annotations

import importlib.util
import os

from lit_fast.loggers.logger import Logger


def default_logger(root_dir: str | os.PathLike[str]) -> Logger:
    """A `TensorBoardLogger` where tensorboard is installed (it is not imported here), else a `CSVLogger`."""
    if importlib.util.find_spec("tensorboard") is not None:
        from lit_fast.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(root_dir)
    from lit_fast.loggers.csv_logs import CSVLogger

    return CSVLogger(root_dir)
