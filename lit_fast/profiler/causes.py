"""Why a step was slow: what took so much longer in it than in the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lit_fast import ops
from lit_fast.profiler.record import Distribution

SHARE = 0.2  # of the time that a step took longer than the median one: less is no cause
NAMES = {"data": "waited for data", "validation": "validation", "checkpoint": "checkpoint", "logging": "logging"}


class Usual(NamedTuple):
    """What a step usually takes, in s: medians."""

    step: float
    phases: dict[str, float]  # a phase that not even every second step has is not usual at all

    @classmethod
    def of(cls, steps: Distribution, phases: Mapping[str, Distribution]) -> Usual:
        """From durations of all steps, and by phase, of its time in the steps in which it took any."""
        common = {name: found.quantile(0.5) for name, found in phases.items() if 2 * found.count > steps.count}
        return cls(steps.quantile(0.5), common)


def causes_of(slow: ops.SlowStepTime, usual: Usual) -> list[str]:
    """What made that step slower than the median one, with figures: what stopped it, then the phases it took longer in.

    Example:
        >>> slow = ops.SlowStepTime(9, 5_000_000, 0, {"data": 4_100_000}, {}, None, 0)
        >>> causes_of(slow, Usual(1e-3, {}))
        ['waited for data 4.1 ms']
    """
    excess = slow.duration * 1e-9 - usual.step
    if excess <= 0.05 * usual.step:
        return []
    stopped = [(ns * 1e-9, f"{kind} {_milliseconds(ns * 1e-9)}") for kind, ns in slow.interruptions.items()]
    if slow.step == 0:
        stopped.append((math.inf, "the first step"))
    found: list[tuple[float, str]] = []
    for phase, ns in slow.phases.items():
        more = ns * 1e-9 - usual.phases.get(phase, 0.0)
        if phase == "hooks" and slow.longest_part is not None and slow.longest_part[0] == "hooks":
            found.append((more, f"{slow.longest_part[1]} {_milliseconds(slow.longest * 1e-9)}"))
        elif phase in usual.phases and phase != "data":
            found.append((more, f"{phase} +{_milliseconds(more)}"))
        else:
            found.append((more, f"{NAMES.get(phase, phase)} {_milliseconds(ns * 1e-9)}"))
    by_weight = (*sorted(stopped, reverse=True), *sorted(found, reverse=True))
    return [said for weight, said in by_weight if weight >= SHARE * excess]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1.0 else f"{seconds:.3g} s"
