"""GradientAccumulationScheduler: the schedule, resuming, what it refuses.

That it computes what Lightning computes is in test_averaging_scenarios.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, trainer

from lit_fast.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lit_fast.errors import MisconfigurationException


def test_the_factor_of_an_epoch() -> None:
    given = {2: 4, 5: 1}
    schedule = GradientAccumulationScheduler(given)
    assert [schedule.get_accumulate_grad_batches(epoch) for epoch in range(7)] == [1, 1, 4, 4, 4, 1, 1]
    assert schedule.going_to_accumulate_grad_batches()
    assert given == {2: 4, 5: 1}  # the caller's stays as it was
    assert not GradientAccumulationScheduler({3: 1}).going_to_accumulate_grad_batches()


class Steps(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def on_train_epoch_end(self) -> None:
        self.steps.append(self.global_step)


def test_steps_of_each_epoch() -> None:
    model = Steps()
    made = trainer(max_epochs=4, callbacks=[GradientAccumulationScheduler({1: 2, 2: 4, 3: 1})])
    made.fit(model, batches(5))
    assert model.steps == [5, 5 + 3, 8 + 2, 10 + 5]
    made.fit_loop.max_epochs = 5  # it goes on, though the Trainer now has another factor than it was given
    made.fit(model, batches(5))
    assert model.steps[-1] == 20


@pytest.mark.parametrize("step", [6, 7, 9, 10])
def test_a_fit_goes_on_inside_an_epoch_with_its_factor(tmp_path: Path, step: int) -> None:
    def fit(model: Plain, ckpt_path: Any = None) -> None:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        schedule = GradientAccumulationScheduler({1: 2, 2: 4})
        made = trainer(max_epochs=3, callbacks=[schedule, saver], enable_checkpointing=True)
        made.fit(model, batches(5), ckpt_path=ckpt_path)
        assert made.global_step == 10

    whole, resumed = Plain(), Plain()
    fit(whole)
    fit(resumed, tmp_path / f"step={step}.ckpt")
    assert resumed.losses == whole.losses[len(whole.losses) - len(resumed.losses) :]
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


@pytest.mark.parametrize("schedule", [{}, {-1: 2}, {0.5: 2}, {0: 0}, {0: 1.5}])
def test_schedules_that_cannot_be_are_refused(schedule: Any) -> None:
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler"):
        GradientAccumulationScheduler(schedule)


def test_what_cannot_be_is_refused() -> None:
    schedule = GradientAccumulationScheduler({0: 2})
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=3"):
        trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[schedule]).fit(Plain(), batches(2))

    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="manual"):
        trainer(max_epochs=1, callbacks=[schedule]).fit(Manual(), batches(2))

    class Overrides(Plain):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="optimizer_zero_grad"):
        trainer(max_epochs=1, callbacks=[schedule]).fit(Overrides(), batches(2))
