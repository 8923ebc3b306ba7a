"""How long each action took, and how often it ran."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from time import perf_counter

from lit_fast.profiler.profiler import Profiler


class SimpleProfiler(Profiler):
    """Mean and total wall time of every action, in seconds.

    Args:
        dirpath, filename: where the report goes (see `Profiler`).
        extended: with the number of calls and the share of the time since the profiler was made. Actions nest, so
            that shares add up to more than 100 %.

    Attributes:
        recorded_durations: the seconds of each call, by action.

    Raises:
        ValueError: an action starts that runs already, or stops without having started.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        self.start_time = perf_counter()

    def start(self, action_name: str) -> None:
        if action_name in self.current_actions:
            raise ValueError(f"The action {action_name!r} has already started; stop it before it starts again.")
        self.current_actions[action_name] = perf_counter()

    def stop(self, action_name: str) -> None:
        now = perf_counter()
        if action_name not in self.current_actions:
            raise ValueError(f"The action {action_name!r} was never started, so it cannot stop.")
        self.recorded_durations[action_name].append(now - self.current_actions.pop(action_name))

    def summary(self) -> str:
        elapsed = perf_counter() - self.start_time
        rows = [(name, sum(durations), len(durations)) for name, durations in self.recorded_durations.items()]
        rows.sort(key=lambda row: row[1] if self.extended else row[1] / row[2], reverse=True)
        if self.extended:
            rows.insert(0, ("in all", elapsed, sum(calls for _, _, calls in rows)))
        table = [["action", "mean (s)", "total (s)", *(["calls", "% of time"] if self.extended else [])]]
        for name, total, calls in rows:
            mean = f"{total / calls:.5g}" if calls and name != "in all" else "-"
            more = [str(calls), f"{100 * total / elapsed:.4g}"] if self.extended else []
            table.append([name, mean, f"{total:.5g}", *more])
        # rich would take 15 ms for this, as long as a small fit
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(f"{text:>{w}}" for text, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        ]
        return "\n".join([self._title(), "", lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"
