"""Windows of steps of two sides, as ratios with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from lit_fast.profiler.record import PHASES, Compared

DRAWS = 10_000  # of the bootstrap
# What comes once in many steps, and a loop by hand has none of: it is in the profile, not in a comparison of steps.
LEFT_OUT = ("setup", "validation", "checkpoint", "profiling")


def rows(ours: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]], paired: bool) -> list[Compared]:
    """A row for each phase that ran on either side, and "step" for all of it.

    Args:
        ours, baseline: seconds a step by phase, of each window.
        paired: window i of both sides ran side by side.
    """
    sides = [[_whole(window) for window in side] for side in (ours, baseline)]
    made = []
    for name in (*PHASES, "step"):
        columns = [[window.get(name, 0.0) for window in side] for side in sides]
        if any(any(column) for column in columns):
            made.append(row(name, columns[0], columns[1], paired))
    return made


def _whole(window: Mapping[str, float]) -> dict[str, float]:
    of_steps = {name: seconds for name, seconds in window.items() if name not in LEFT_OUT}
    return {**of_steps, "step": sum(of_steps.values())}


def row(name: str, ours: Sequence[float], baseline: Sequence[float], paired: bool) -> Compared:
    """Medians over windows, and the ratio with its interval.

    Example:
        >>> made = row("step", [2.0, 2.2, 2.1, 2.0, 2.1], [1.0, 1.1, 1.0, 1.0, 1.1], paired=True)
        >>> made.ratio, made.low <= made.ratio <= made.high
        (2.0, True)
    """
    made = Compared(name, median(baseline), median(ours), baseline_windows=list(baseline), ours_windows=list(ours))
    if min(baseline) > 0.0:
        made.ratio, made.low, made.high = bootstrap(ours, baseline, paired)
    return made


def bootstrap(ours: Sequence[float], baseline: Sequence[float], paired: bool) -> tuple[float, float, float]:
    """The ratio, and the 95 % percentile interval of it over resampled windows (Efron's bootstrap; seed 0).

    Paired: the median of the pairs' ratios. Otherwise: the ratio of the medians, each side resampled by itself.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(values: Tensor) -> Tensor:
        index = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
        return values[index].quantile(0.5, dim=1)

    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(baseline, dtype=torch.float64)
    if paired:
        ratio, ratios = float((a / b).quantile(0.5)), drawn(a / b)
    else:
        ratio, ratios = float(a.quantile(0.5) / b.quantile(0.5)), drawn(a) / drawn(b)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ratio, low, high
