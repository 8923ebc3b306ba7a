"""Metrics in TensorBoard event files, written by tensorboard's own thread."""

from __future__ import annotations

import os
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_fast.errors import MisconfigurationException
from lit_fast.loggers.logger import FolderLogger, rank_zero_experiment
from lit_fast.loggers.utilities import (
    add_prefix,
    flatten,
    number,
    params_dict,
    primitives,
    write_yaml,
)
from lit_fast.rank_zero import rank

# Events that may wait for the writer thread before `log_metrics` would have to wait too (torch's default is
# 10).
_MAX_QUEUE = 1000


class TensorBoardLogger(FolderLogger):
    """Writes event files and `hparams.yaml` to `<save_dir>/<name>/version_<N>/`.

    All numbers of one `log_metrics` call go into one event. The calling thread serializes the event and puts
    it on a queue; tensorboard's thread writes it, at most `flush_secs` (120) seconds later to disk.

    Args:
        save_dir: directory of all experiments.
        name: name of the experiment; "" or None leaves out that level.
        version: a number N, or a string that is used as the folder's name; the next free number when left
        out. log_graph: write the module's graph, traced with `example_input_array`.
        default_hp_metric: write the metric `hp_metric` = -1 with hyperparameters that come without
            metrics, so that TensorBoard lists the run.
        prefix: put before every metric's name, joined by "-".
        sub_dir: folder for the event files inside the version's folder.
        kwargs: passed to `torch.utils.tensorboard.SummaryWriter` (`max_queue`, `flush_secs`,
            `filename_suffix` ...).

    Raises:
        MisconfigurationException: tensorboard is not installed (when the first file is written).

    Example::

        logger = TensorBoardLogger("logs", name="gpt")
        logger.log_metrics({"loss": 0.5}, step=0)
        logger.experiment.add_histogram("weights", weights, 0)
        logger.finalize("success")
    """

    LOGGER_JOIN_CHAR = "-"
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._prefix = prefix
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._kwargs = kwargs
        self.hparams: dict[str, Any] = {}
        self._experiment: Any = None
        self._write: Any = None

    @property
    def sub_dir(self) -> str | None:
        """Folder of the event files inside the version's folder."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        path = os.path.join(super().log_dir, self._sub_dir or "")
        return os.path.expanduser(os.path.expandvars(path.rstrip(os.sep)))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `torch.utils.tensorboard.SummaryWriter` behind this logger, made with its file at first use."""
        if self._experiment is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MisconfigurationException(
                    "TensorBoardLogger needs tensorboard, which is not installed; run: pip "
                    "install tensorboard, or use CSVLogger."
                ) from error
            options = {"max_queue": _MAX_QUEUE, **self._kwargs}
            self._experiment = SummaryWriter(log_dir=self.log_dir, **options)
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics: numbers, 0-dim tensors, or dicts of numbers (one chart with several lines).

        Raises:
            ValueError: a value that is no number; the message names it.
        """
        write = self._write or self._bind_writer()
        scalars: dict[str, Any] = {}
        for name, value in add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR).items():
            if isinstance(value, Mapping):
                self.experiment.add_scalars(name, value, step)
            else:
                scalars[name] = number(value)
        if scalars:
            write(scalars, step)

    def _bind_writer(self) -> Any:
        """A function that puts one event with all its scalars on the writer thread's queue."""
        if rank() != 0:
            self._write = lambda scalars, step: None
            return self._write
        add_event = self.experiment._get_file_writer().event_writer.add_event
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalar = Summary.Value

        def write(scalars: dict[str, Any], step: int | None) -> None:
            try:
                values = [scalar(tag=name, simple_value=value) for name, value in scalars.items()]
            except TypeError:
                name, value = next(item for item in scalars.items() if not isinstance(item[1], bool | int | float))
                raise ValueError(
                    f"TensorBoardLogger was given {name!r} = {value!r} ({type(value).__name__}); allowed are "
                    f"numbers, 0-dim tensors and dicts of them."
                ) from None
            add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

        self._write = write
        return write

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: Any = None,
        step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Record hyperparameters; `metrics` (a dict, or one number called `hp_metric`) shows beside them."""
        if rank() != 0:
            return
        given = params_dict(params)
        self.hparams.update(given)
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, dict):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, step)
        from torch.utils.tensorboard.summary import hparams

        writer = self.experiment._get_file_writer()
        for summary in hparams(primitives(flatten(given)), metrics):  # type: ignore[no-untyped-call]
            writer.add_summary(summary, step)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        if not self._log_graph or rank() != 0:
            return
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if not isinstance(example, Tensor | tuple):
            warnings.warn(
                f"TensorBoardLogger(log_graph=True) writes no graph: the example input must be a tensor "
                f"or a tuple of forward's arguments, and is {type(example).__name__}; set the module's "
                f"example_input_array.",
                stacklevel=2,
            )
            return
        device = next((parameter.device for parameter in model.parameters()), None)
        inputs = tuple(
            item.to(device) if isinstance(item, Tensor) else item
            for item in (example if isinstance(example, tuple) else (example,))
        )
        self.experiment.add_graph(model, inputs)

    def save(self) -> None:
        if rank() != 0:
            return
        self.experiment.flush()
        path = os.path.join(self.log_dir, self.NAME_HPARAMS_FILE)
        if not os.path.isfile(path):
            write_yaml(path, self.hparams)

    def finalize(self, status: str) -> None:
        """Write and close the event file; hyperparameters are written where the run succeeded."""
        if self._experiment is not None:
            self._experiment.flush()
            if status == "success":
                self.save()
            self._experiment.close()
            self._write = None  # the SummaryWriter opens a new file when it is used again
        elif status == "success":
            self.save()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None, "_write": None}
