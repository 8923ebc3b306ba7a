"""The step profiler: phases that add up, and a step that it does not change."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from heart_models import QUIET, NoLength, Plain, batches, fitted, shuffled

import lit_fast
from lit_fast.profiler.profiler import PassThroughProfiler
from lit_fast.profiler.step import PHASES, StepProfiler


def test_phases_sum_to_the_wall_time() -> None:
    class Validates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    made = fitted(Validates(), batches(20), [batches(2)], max_epochs=2, profiler="step", gradient_clip_val=1.0)
    phases = made.profiler.phases()
    assert list(phases) == list(PHASES)
    assert abs(sum(phases.values()) - made.profiler.wall) <= 1e-9  # sums of doubles of a few seconds
    assert all(seconds >= 0.0 for seconds in phases.values())
    assert all(phases[name] > 0.0 for name in ("data", "forward", "backward", "optimizer", "hooks", "validation"))
    costs = made.profiler.step_costs()
    assert costs["forward"] * 40 / 1e6 == pytest.approx(phases["forward"], rel=1e-12)


def test_nested_phases_count_once() -> None:
    profiler = StepProfiler()
    profiler.start()
    began = perf_counter()
    with profiler.phase("hooks"):
        sleep(0.01)
        with profiler.phase("checkpoint"):
            sleep(0.02)
    profiler.stop()
    took = perf_counter() - began
    phases = profiler.phases()
    assert phases["checkpoint"] >= 0.02 and phases["hooks"] >= 0.01
    assert phases["hooks"] + phases["checkpoint"] <= took


def test_an_error_leaves_the_stack_right() -> None:
    profiler = StepProfiler()
    profiler.start()

    def broken() -> None:
        raise KeyError

    for _ in range(2):
        with suppress(KeyError):
            profiler.wrap("forward", broken)()
    sleep(0.002)
    profiler.stop()
    assert profiler.phases()["forward"] < 0.002 <= profiler.phases()["unexplained"]


def test_losses_are_the_same_with_and_without() -> None:
    losses = []
    for profiler in (None, "step", StepProfiler()):
        for data in (lambda: shuffled(50), lambda: NoLength(batches(13))):
            torch.manual_seed(1)
            model = Plain(lambda p: torch.optim.AdamW(p, lr=0.01))
            fitted(model, data(), max_epochs=3, profiler=profiler, accumulate_grad_batches=3, gradient_clip_val=0.5)
            losses.append(model.losses)
    assert losses[0] == losses[2] == losses[4] and losses[1] == losses[3] == losses[5]


def test_switched_off_nothing_is_wrapped() -> None:
    model = Plain()
    made = fitted(model, batches(2), max_epochs=1)
    assert type(made.profiler) is PassThroughProfiler
    assert made.fit_loop.plans.whole.training_step == model.training_step


def test_saving_is_a_phase(tmp_path: Path) -> None:
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
    made = lit_fast.Trainer(**options, max_epochs=1, profiler="step")
    made.fit(Plain(), batches(2))
    assert made.profiler.phases()["checkpoint"] > 0.0
