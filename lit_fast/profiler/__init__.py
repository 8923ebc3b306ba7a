"""Where the time of a run goes."""

from lit_fast.profiler.step import StepProfiler

__all__ = ["StepProfiler"]
