"""Where the time of a run goes: by phase of the step (`StepProfiler`), or by Lightning's named actions."""

from lit_fast.profiler.advanced import AdvancedProfiler
from lit_fast.profiler.profiler import PassThroughProfiler, Profiler
from lit_fast.profiler.pytorch import PyTorchProfiler
from lit_fast.profiler.simple import SimpleProfiler
from lit_fast.profiler.step import StepProfiler

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "StepProfiler"]
