"""The base of profilers that are told which action begins and ends, and the one that records nothing."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_fast.rank_zero import rank_zero_info


class Profiler(ABC):
    """Override `start` and `stop`, and `summary` for a report at the end of each run.

    Args:
        dirpath: the folder of the report; None: where the trainer's first logger writes.
        filename: the report goes to `<dirpath>/<stage>-<filename>.txt`; None: it is logged, on the logger `lit_fast`.

    Example::

        class Count(Profiler):
            calls = 0

            def start(self, action_name):
                self.calls += 1

            def stop(self, action_name): ...

        Trainer(profiler=Count()).fit(model, loader)
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._local_rank: int | None = None
        self._lightning_module: Any = None  # of the running trainer

    @abstractmethod
    def start(self, action_name: str) -> None:
        """`action_name` begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """`action_name` has ended."""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """The block is one action; an exception in it ends the action too."""
        try:
            self.start(action_name)
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """The report; empty where there is none."""
        return ""

    def describe(self) -> None:
        """Write the report to the file, or log it."""
        report = self.summary()
        if report and self.filename and self.dirpath:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(report)
        elif report and self.local_rank == 0:
            rank_zero_info(report)
        self.teardown(self._stage)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run begins: "fit", "validate", "test" or "predict"; `local_rank` is None in a single process."""
        self._stage, self._local_rank = stage, local_rank
        self.dirpath = self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:  # noqa: B027  # optional: most have nothing to tear down
        """A run has ended, and its report is written."""

    @property
    def local_rank(self) -> int:
        return self._local_rank or 0

    def _file_name(self, action_name: str | None = None) -> str:
        """Stage, filename, rank and action as far as they are known, without what a file name must not hold."""
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = [part for part in (self._stage, self.filename, rank, action_name) if part]
        return re.sub(r'[\\/:*?"<>|\s]+', "_", "-".join(parts)) or "profile"

    def _path(self, action_name: str | None = None, extension: str = ".txt") -> Path:
        return Path(self.dirpath or ".") / (self._file_name(action_name) + extension)

    def _title(self) -> str:
        stage = f" of {self._stage}" if self._stage else ""
        rank = "" if self._local_rank is None else f", rank {self._local_rank}"
        return f"Profile{stage}{rank}"

    def _sections(self, tables: Mapping[str, str]) -> str:
        lines = [self._title()]
        for name, table in tables.items():
            lines += ["", f"-- {name}", table]
        return os.linesep.join(lines) + os.linesep


class PassThroughProfiler(Profiler):
    """Records nothing: what `trainer.profiler` is where no profiler was asked for, so that `profile` works there."""

    def start(self, action_name: str) -> None: ...

    def stop(self, action_name: str) -> None: ...
