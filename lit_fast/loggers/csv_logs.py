"""Metrics in a CSV file, hyperparameters in a YAML file: no package needed to read either."""

from __future__ import annotations

import csv
import os
import warnings
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from lit_fast.loggers.logger import FolderLogger, rank_zero_experiment
from lit_fast.loggers.utilities import add_prefix, number, params_dict, write_yaml
from lit_fast.rank_zero import rank


class ExperimentWriter:
    """Collects rows and writes them in batches; one column per metric, empty where a row lacks it.

    A metric that first appears later gets its column then: the file is written anew beside the old one and
    renamed.
    """

    NAME_METRICS_FILE = "metrics.csv"
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.hparams: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.metrics_keys: list[str] = []
        self.metrics_file_path = os.path.join(log_dir, self.NAME_METRICS_FILE)
        self._file: TextIO | None = None
        self._hparams_written: dict[str, Any] = {}
        os.makedirs(log_dir, exist_ok=True)
        if os.path.exists(self.metrics_file_path):
            warnings.warn(
                f"{self.metrics_file_path} of an earlier run is replaced; to keep it give another `version`.",
                stacklevel=4,
            )
            os.remove(self.metrics_file_path)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Add hyperparameters; written by the next `save`."""
        self.hparams.update(params)

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Keep one row; written by the next `save`."""
        row = {name: number(value) for name, value in metrics_dict.items()}
        row["step"] = len(self.metrics) if step is None else step
        self.metrics.append(row)

    def save(self) -> None:
        """Write the rows kept so far, and the hyperparameters where they changed."""
        if self.hparams != self._hparams_written:
            write_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)
            self._hparams_written = dict(self.hparams)
        if not self.metrics:
            return
        new = set().union(*self.metrics) - set(self.metrics_keys)
        if new:
            self.metrics_keys = sorted(new.union(self.metrics_keys))
            self._rewrite_with_new_header()
        if self._file is None:
            self._file = open(self.metrics_file_path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        csv.DictWriter(self._file, self.metrics_keys).writerows(self.metrics)
        self._file.flush()
        self.metrics = []

    def close(self) -> None:
        """Close the file; the next `save` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite_with_new_header(self) -> None:
        self.close()
        rows: list[dict[str, Any]] = []
        with suppress(FileNotFoundError), open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        temporary = f"{self.metrics_file_path}.tmp"
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.metrics_file_path)


class CSVLogger(FolderLogger):
    """Writes `<save_dir>/<name>/version_<N>/metrics.csv` and `hparams.yaml`.

    Args:
        save_dir: directory of all experiments.
        name: name of the experiment; "" or None leaves out that level.
        version: a number N, or a string that is used as the folder's name; the next free number when left
        out. prefix: put before every metric's name, joined by "-".
        flush_logs_every_n_steps: rows are kept in memory and written whenever this many steps have passed.

    Example::

        logger = CSVLogger("logs", name="gpt")
        logger.log_metrics({"loss": 0.5}, step=0)
        logger.finalize("success")
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version)
        self._prefix = prefix
        self._flush_logs_every_n_steps = flush_logs_every_n_steps
        self._flushes = 0
        self._experiment: ExperimentWriter | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `ExperimentWriter` behind this logger."""
        if self._experiment is None:
            self._experiment = ExperimentWriter(self.log_dir)
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        writer = self._experiment
        if writer is None:
            if rank() != 0:
                return
            writer = self.experiment
        step = len(writer.metrics) if step is None else step
        writer.log_metrics(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR), step)
        # a count of full intervals, since a logging interval need not divide this one
        flushes = (step + 1) // self._flush_logs_every_n_steps
        if flushes != self._flushes:
            self._flushes = flushes
            self.save()

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any) -> None:
        self.experiment.log_hparams(params_dict(params))

    def save(self) -> None:
        self.experiment.save()

    def finalize(self, status: str) -> None:
        """Write what is left and close the file."""
        if self._experiment is not None:
            self._experiment.save()
            self._experiment.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}
