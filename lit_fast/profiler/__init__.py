"""Where the time of a run goes: by phase of the step (`StepProfiler`), or by Lightning's named actions.

Each profiler is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AdvancedProfiler": "advanced",
    "PassThroughProfiler": "profiler",
    "Profiler": "profiler",
    "PyTorchProfiler": "pytorch",
    "SimpleProfiler": "simple",
    "StepProfiler": "step",
}

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "StepProfiler"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
