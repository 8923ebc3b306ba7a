"""Where the time of a run goes: by phase of the step (`StepProfiler`, and closer `DeepProfiler`), or by Lightning's
named actions.

Each profiler is imported when it is first used.
"""

from __future__ import annotations

from typing import Any

from lit_fast import lazy

_HOME = {
    "AdvancedProfiler": "advanced",
    "DeepProfiler": "deep",
    "PassThroughProfiler": "profiler",
    "Profiler": "profiler",
    "PyTorchProfiler": "pytorch",
    "SimpleProfiler": "simple",
    "StepProfiler": "step",
}

__all__ = [
    "AdvancedProfiler",
    "DeepProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "StepProfiler",
]


def __getattr__(name: str) -> Any:
    if name == "XLAProfiler":
        from lit_fast.not_built import XLAProfiler

        return XLAProfiler
    return lazy.find(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
