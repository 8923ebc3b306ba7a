"""What profilers add to a training step: `"step"`, with files written meanwhile, and `"deep"` in its window.

Linear(32, 2), batch 4, AdamW: a step that is nearly all overhead, without callbacks and with five hooks of the step.
Fits run in turns, as in callback_cost, and figures are medians of differences within turns, in processor time. What a
microsecond is there, where a fit's objects lie in memory and what else the machine does decide; so the timed calls are
also measured by themselves: one fit, whose plan runs from step to step what the profiler wrapped, and what it had
wrapped; the figure is the median difference of neighbours. So is that of torch.profiler and its ranges, as in a deep
profile's window, on the GPT of `profiling/gpt_tiny.py`. Off, a step calls the very functions that were bound, and after
the window it runs what it ran before, which tests assert (tests/profiler/test_profiler_step.py, test_deep.py).

A step waits for one piece of a file at most: the longest is told in processor time of the thread that makes it, and the
pause that comes of it as a loop sees it that never waits.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

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


class Neighbours:
    """Batches for pairs of steps: `switch(True)` is called before one of them, `switch(False)` before the other."""

    def __init__(
        self, batch: Any, warmup: int, pairs: int, switch: Callable[[bool], None], clock: Callable[[], int]
    ) -> None:
        self.batch, self.warmup, self.pairs, self.switch, self.clock = batch, warmup, pairs, switch, clock
        self.took: dict[bool, list[int]] = {False: [], True: []}  # ns

    def __len__(self) -> int:
        return self.warmup + 2 * self.pairs + 1

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.warmup):
            yield self.batch
        for index in range(2 * self.pairs):
            on = bool(index % 2) != bool(index // 40 % 2)  # which comes first takes turns, too
            self.switch(on)
            begin = self.clock()
            yield self.batch
            self.took[on].append(self.clock() - begin)
        yield self.batch

    def added(self) -> float:
        """ns"""
        return difference(self.took[True], self.took[False])

    def ratio(self) -> float:
        return statistics.median(on / off for on, off in zip(self.took[True], self.took[False], strict=True))


def unwrapped(bound: Any) -> Any:
    """What a profiler had wrapped."""
    if isinstance(bound, tuple):
        return tuple(map(unwrapped, bound))
    return bound.__wrapped__ if type(bound).__name__ == "TimedCall" else bound


def timed_calls(hooks: Sequence[str], pairs: int, root: Path) -> float:
    """us that the timed calls of a step add."""
    import torch

    from lit_fast.profiler import StepProfiler

    def switch(on: bool) -> None:
        plan = profiler._trainer.fit_loop.plans.kind(True, True, 1)  # type: ignore[union-attr]
        if not kinds:
            kinds[True] = {field.name: getattr(plan, field.name) for field in fields(plan)}
            kinds[False] = {name: unwrapped(bound) for name, bound in kinds[True].items()}
        for name, bound in kinds[on].items():
            setattr(plan, name, bound)

    profiler, kinds = StepProfiler(show=False), dict[bool, dict[str, Any]]()
    batches = Neighbours(torch.randn(4, 32), 100, pairs, switch, time.perf_counter_ns)
    fit(hooks, batches, root, profiler=profiler)
    return batches.added() * 1e-3


def deep_window(pairs: int, root: Path) -> float:
    """How many times as long a step of a small GPT takes in the window of a deep profile."""
    import torch
    from torch.autograd.profiler import record_function
    from torch.profiler import ProfilerActivity, profile

    import lit_fast
    from lit_fast.models.gpt import GPT
    from lit_fast.profiler import StepProfiler
    from lit_fast.profiler.deep import _with_ranges
    from lit_fast.profiler.kernels import STEP as RANGE

    activities = [ProfilerActivity.CPU]
    state: dict[str, Any] = {"steps": 0}

    def switch(on: bool) -> None:
        if state["steps"] % 100 == 0:  # what was recorded is let go of
            if "profiler" in state:
                state["profiler"].stop()
            state["profiler"], state["on"] = profile(activities=activities), True
            state["profiler"].start()
        state["steps"] += 1
        if on is not state["on"]:
            state["profiler"].toggle_collection_dynamic(on, activities)
            state["on"] = on

    class Looks(StepProfiler):
        def bind_run(self, run: Callable[..., None], last: bool) -> Callable[..., None]:
            def looked_at(plan: Any, batch: Any, batch_idx: int) -> None:
                if not state.get("on"):
                    return run(plan, batch, batch_idx)
                with record_function(RANGE):
                    return run(_with_ranges(plan, torch.device("cpu")), batch, batch_idx)

            return looked_at

    tokens = torch.randint(0, 512, (8, 65), generator=torch.Generator().manual_seed(0))
    batches = Neighbours(tokens, 5, pairs, switch, time.thread_time_ns)
    trainer = lit_fast.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        profiler=Looks(show=False),
    )
    trainer.fit(GPT(512, 64, num_layers=4, num_heads=4, embedding_dim=128, total_steps=20_000), batches)
    state["profiler"].stop()
    return batches.ratio()


def full_profile() -> Any:
    """A profiler that has recorded a thousand steps with twenty hooks."""
    from lit_fast.profiler import StepProfiler

    profiler = StepProfiler(show=False)
    profiler.start()
    hooks = [profiler.wrap("hooks", int, f"hook {number}") for number in range(20)]
    for _ in profiler.wrap_batches(iter(range(1000))):
        for hook in hooks:
            hook()
    return profiler


def longest_piece(profiler: Any) -> float:
    """ms of processor time, of the pieces that a file is made in."""
    from lit_fast.profiler import files, step, writer

    pieces, began = [], 0

    def between() -> None:
        nonlocal began
        pieces.append(time.thread_time_ns() - began)
        began = time.thread_time_ns()

    rooms = (step, writer)
    kept = [room.let_others_run for room in rooms]
    for room in rooms:
        room.let_others_run = between
    try:
        began = time.thread_time_ns()
        for _ in files.pieces(profiler.profile()):
            between()
    finally:
        for room, before in zip(rooms, kept, strict=True):
            room.let_others_run = before
    return max(pieces) * 1e-6


def longest_pause(profiler: Any, seconds: float) -> float:
    """ms that a thread which never waits is held up by the writing of a full profile, at worst, in that time."""
    from lit_fast.profiler.writer import PeriodicWriter

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
    return max(pauses[1] - pauses[0], 0.0) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, rounds=5).parse_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch.profiler warns whenever it is switched on and off
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        rounds = [in_turns(fits(Path(name)), options.turns, options.steps) for _ in range(options.rounds)]
        calls = {case: timed_calls(hooks, 3000, Path(name)) for case, hooks in ((STEP, ()), (STEP_HOOKS, CASES[FIVE]))}
        deep = deep_window(100, Path(name))
    recorded = full_profile()
    gc.collect()
    pieces = [longest_piece(recorded) for _ in range(2 * options.rounds)]
    pauses = [longest_pause(recorded, 0.5) for _ in range(options.rounds)]
    recorded.stop()

    def added(case: str, base: str) -> float:
        return statistics.median(difference(found[case], found[base]) for found in rounds)

    rows = [
        Row("off: a step", statistics.median(statistics.median(found[OFF]) for found in rounds), "us"),
        Row("step profiler", added(STEP, OFF), "us", ("<=", 3.0)),
        Row("step profiler, five hooks of the step", added(STEP_HOOKS, OFF_HOOKS), "us", ("<=", 3.0)),
        Row("its timed calls, in neighbouring steps", calls[STEP], "us", ("<=", 3.0)),
        Row("its timed calls, five hooks of the step, in neighbouring steps", calls[STEP_HOOKS], "us", ("<=", 3.0)),
        Row("longest piece of a file, in processor time", statistics.median(pieces), "ms", ("<=", 1.0)),
        Row("longest pause by the writing of a file", statistics.median(pauses), "ms"),
        Row("deep profiler in its window, a small GPT", deep, "x", ("<=", 1.05)),
    ]
    return harness.finish("profiler_cost", "Cost of the profilers", rows, options)


if __name__ == "__main__":
    sys.exit(main())
