"""Why a step was slow: what took so much longer in it than in the others."""

from __future__ import annotations

import math

from lit_fast import ops
from lit_fast.profiler.record import Distribution

SHARE = 0.2  # of the time that a step took longer than the median one: less is no cause
NAMES = {"data": "waited for data", "validation": "validation", "checkpoint": "checkpoint", "logging": "logging"}


def causes_of(slow: ops.SlowStepTime, steps: Distribution, typical: dict[str, Distribution]) -> list[str]:
    """What made that step slower than the median one, with figures: what stopped it, then the phases it took longer in.

    Args:
        slow: the step.
        steps: durations of all steps.
        typical: by phase, its time in the steps in which it took any.

    Example:
        >>> usual, slow = Distribution(), ops.SlowStepTime(9, 5_000_000, 0, {"data": 4_100_000}, {}, None, 0)
        >>> usual.add(1e-3, 99)
        >>> causes_of(slow, usual, {})
        ['waited for data 4.1 ms']
    """
    excess = slow.duration * 1e-9 - steps.quantile(0.5)
    if excess <= 0.05 * steps.quantile(0.5):
        return []
    stopped = [(ns * 1e-9, f"{kind} {_milliseconds(ns * 1e-9)}") for kind, ns in slow.interruptions.items()]
    if slow.step == 0:
        stopped.append((math.inf, "the first step"))
    found: list[tuple[float, str]] = []
    for phase, ns in slow.phases.items():
        rows = typical.get(phase, Distribution())
        # A phase that not even every second step has is a cause as a whole.
        usual = rows.quantile(0.5) if 2 * rows.count > steps.count else 0.0
        more = ns * 1e-9 - usual
        if phase == "hooks" and slow.longest_part is not None and slow.longest_part[0] == "hooks":
            found.append((more, f"{slow.longest_part[1]} {_milliseconds(slow.longest * 1e-9)}"))
        elif usual and phase != "data":
            found.append((more, f"{phase} {_milliseconds(more)} more than usual"))
        else:
            found.append((more, f"{NAMES.get(phase, phase)} {_milliseconds(ns * 1e-9)}"))
    by_weight = (*sorted(stopped, reverse=True), *sorted(found, reverse=True))
    return [said for weight, said in by_weight if weight >= SHARE * excess]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1.0 else f"{seconds:.3g} s"
