"""What `profiler="step"` adds to a training step, with files written meanwhile.

Linear(32, 2), batch 4, AdamW: a step that is nearly all overhead, without callbacks and with five hooks of the step.
Fits run in turns, as in callback_cost, and figures are medians of differences within turns, in processor time. Off, a
step calls the very functions that were bound, which a test asserts (tests/profiler/test_profiler_step.py).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.callback_cost import CASES, FIVE, Batches, arguments, difference, fit, in_turns
from benchmarks.harness import Row

QUICK = True
OFF, STEP, OFF_HOOKS, STEP_HOOKS = "off", "step", "off, five hooks", "step, five hooks"


def fits(root: Path) -> dict[str, Callable[[Batches], None]]:
    from lit_fast.profiler import StepProfiler

    def profiler(name: str) -> StepProfiler:
        return StepProfiler(root / name, write_every=1.0, show=False)

    return {
        OFF: partial(fit, (), root=root),
        STEP: partial(fit, (), root=root, profiler=profiler("none")),
        OFF_HOOKS: partial(fit, CASES[FIVE], root=root),
        STEP_HOOKS: partial(fit, CASES[FIVE], root=root, profiler=profiler("five")),
    }


def longest_pause(seconds: float) -> float:
    """ms that a thread which never waits is held up by the writing of a full profile, at worst, in that time."""
    from lit_fast.profiler import StepProfiler
    from lit_fast.profiler.writer import PeriodicWriter

    profiler = StepProfiler()
    profiler.start()
    hooks = [profiler.wrap("hooks", int, f"hook {number}") for number in range(20)]
    for _ in profiler.wrap_batches(iter(range(1000))):
        for hook in hooks:
            hook()
    with tempfile.TemporaryDirectory() as folder:
        writer = PeriodicWriter(profiler.profile, Path(folder) / "rank-00000.json", every=0.05)
        pauses = []
        for writes in (False, True):
            if writes:
                writer.start()
            longest, last, end = 0.0, time.perf_counter(), time.perf_counter() + seconds
            while last < end:
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            pauses.append(longest)
        writer.end()
    profiler.stop()
    return max(pauses[1] - pauses[0], 0.0) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, rounds=5).parse_args(argv)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        rounds = [in_turns(fits(Path(name)), options.turns, options.steps) for _ in range(options.rounds)]
    pauses = [longest_pause(0.5) for _ in range(options.rounds)]

    def added(case: str, base: str) -> float:
        return statistics.median(difference(found[case], found[base]) for found in rounds)

    rows = [
        Row("off: a step", statistics.median(statistics.median(found[OFF]) for found in rounds), "us"),
        Row("step profiler", added(STEP, OFF), "us", ("<=", 3.0)),
        Row("step profiler, five hooks of the step", added(STEP_HOOKS, OFF_HOOKS), "us", ("<=", 3.0)),
        Row("longest pause by the writing of a file", statistics.median(pauses), "ms"),
    ]
    return harness.finish("profiler_cost", "Cost of the step profiler", rows, options)


if __name__ == "__main__":
    sys.exit(main())
