"""The base of every logger, and a logger that does nothing."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lit_fast.loggers.utilities import next_version
from lit_fast.rank_zero import rank


class Logger(ABC):
    """Where metrics and hyperparameters go. A subclass gives `name`, `version` and two `log_` methods.

    `log_metrics` is called by the thread that trains: it must return quickly and leave slow work to others.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Version of the experiment."""

    @property
    def root_dir(self) -> str | None:
        """Directory of all versions of the experiment; None where nothing is kept locally."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Directory of this version of the experiment; None where nothing is kept locally."""
        return None

    @property
    def save_dir(self) -> str | None:
        """Directory of all experiments, as given by the user; None where nothing is kept locally."""
        return None

    @property
    def group_separator(self) -> str:
        """What separates a group from a name in a metric's name."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics: Python numbers or 0-dim tensors, by name."""

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record hyperparameters."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:  # noqa: B027
        """Record the model's graph, where the logger can."""

    def save(self) -> None:  # noqa: B027
        """Bring what was logged to disk."""

    def finalize(self, status: str) -> None:
        """The run ended ("success", "failed", ...): save everything and close files."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:  # noqa: B027
        """A checkpoint callback has saved a checkpoint."""


class FolderLogger(Logger):
    """A logger whose files are below `<save_dir>/<name>/version_<N>/`; the next free N where no version is given.

    Args:
        save_dir: directory of all experiments.
        name: name of the experiment; "" or None leaves out that level.
        version: a number N, or a string that is used as the folder's name.
    """

    def __init__(self, save_dir: str | os.PathLike[str], name: str | None, version: int | str | None) -> None:
        super().__init__()
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = next_version(self.root_dir)
        return self._version

    def use_version(self, version: int | str) -> None:
        """Write there; with several processes all use the number that the first one has found free."""
        self._version = version

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        return os.path.join(self._save_dir, self._name)

    @property
    def log_dir(self) -> str:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.join(self.root_dir, version)


class DummyExperiment:
    """Takes every call and does nothing."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._nothing

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        pass


class DummyLogger(Logger):
    """Stands in for loggers where nothing shall be logged (`fast_dev_run`): it takes every call."""

    def __init__(self) -> None:
        super().__init__()
        self._experiment = DummyExperiment()

    @property
    def experiment(self) -> DummyExperiment:
        """An object that takes every call."""
        return self._experiment

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getitem__(self, index: Any) -> DummyLogger:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._experiment._nothing


def rank_zero_experiment(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make an `experiment` getter give a `DummyExperiment` in every process but the first."""

    @functools.wraps(function)
    def experiment(self: Any) -> Any:
        return function(self) if rank() == 0 else DummyExperiment()

    return experiment
