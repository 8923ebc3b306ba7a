"""Which functions each action spent its time in, by Python's own profiler."""

from __future__ import annotations

import cProfile
import io
import pstats
from pathlib import Path

from lit_fast.errors import MisconfigurationException
from lit_fast.profiler.profiler import Profiler


class AdvancedProfiler(Profiler):
    """One `cProfile` for each action. Actions nest: a function call is counted in the innermost one.

    Args:
        dirpath, filename: where the report goes (see `Profiler`).
        line_count_restriction: the lines of each table: a number (int), or a fraction of all (float, 0.0 to 1.0).
        dump_stats: also write `<stage>-<filename>-<action>.prof` into `dirpath`, for `pstats` and its viewers.

    Raises:
        MisconfigurationException: `dump_stats` without a folder to write into.
        ValueError: an action stops that never started.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self._running: list[str] = []  # only the last one is measured: Python allows one profile at a time

    def start(self, action_name: str) -> None:
        self._pause()
        self._running.append(action_name)
        self._resume()

    def stop(self, action_name: str) -> None:
        if action_name not in self._running:
            raise ValueError(f"The action {action_name!r} was never started, so it cannot stop.")
        self._pause()
        del self._running[len(self._running) - 1 - self._running[::-1].index(action_name)]
        self._resume()

    def _pause(self) -> None:
        if self._running:
            self.profiled_actions[self._running[-1]].disable()

    def _resume(self) -> None:
        if self._running:
            self.profiled_actions.setdefault(self._running[-1], cProfile.Profile()).enable()

    def summary(self) -> str:
        if self.dump_stats and not self.dirpath:
            raise MisconfigurationException(
                "AdvancedProfiler(dump_stats=True) has no folder to write into; pass dirpath."
            )
        tables = {}
        for action, profile in self.profiled_actions.items():
            written = io.StringIO()
            profile.create_stats()
            if not getattr(profile, "stats", None):  # nothing was called in it: pstats takes no empty profile
                continue
            pstats.Stats(profile, stream=written).sort_stats("cumulative").print_stats(self.line_count_restriction)
            tables[action] = written.getvalue()
            if self.dump_stats:
                path = self._path(action, ".prof")
                path.parent.mkdir(parents=True, exist_ok=True)
                profile.dump_stats(path)
        return self._sections(tables)

    def teardown(self, stage: str | None) -> None:
        self._pause()
        self._running, self.profiled_actions = [], {}
