"""StochasticWeightAveraging: the average, the epoch of statistics, state, what it refuses.

That it computes what Lightning computes is in test_averaging_scenarios.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, trainer
from torch import nn

from lit_fast.callbacks import Callback, OnExceptionCheckpoint, StochasticWeightAveraging
from lit_fast.errors import MisconfigurationException


class Normed(Plain):
    """With batch norm; raises in batch `fails_at` (epoch, batch)."""

    def __init__(self, fails_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16, momentum=0.3))
        self.fails_at = fails_at
        self.starts: list[list[torch.Tensor]] = []  # weights with which the epochs begin

    def on_train_epoch_start(self) -> None:
        self.starts.append([p.detach().double().clone() for p in self.parameters()])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == self.fails_at:
            raise RuntimeError("power is out")
        return super().training_step(batch, batch_idx)


def swa(**options: Any) -> StochasticWeightAveraging:
    return StochasticWeightAveraging(**{"swa_lrs": 0.02, "swa_epoch_start": 2, **options})


def test_the_average_and_its_statistics() -> None:
    model, callback, data = Normed(), swa(), batches(6)
    made = trainer(max_epochs=4, callbacks=[callback], accumulate_grad_batches=2, gradient_clip_val=1.0)
    made.fit(model, data)
    eps = torch.finfo(torch.float32).eps
    for weights, *counted in zip(model.parameters(), *model.starts[1:4], strict=True):
        mean = torch.stack(counted).mean(0)
        assert (weights.detach().double() - mean).abs().max() <= 8 * eps * max(1.0, float(mean.abs().max()))

    first = [model.net[0](batch) for batch in data]
    norm = model.net[1]
    means, variances = [x.mean(0) for x in first], [x.var(0) for x in first]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.3 and norm.num_batches_tracked == 6
    assert len(model.losses) == 5 * 6 and made.global_step == 4 * 3 and made.current_epoch == 5
    assert made.max_epochs == 4 and not made.fit_loop._skip_backward
    assert callback.state_dict()["n_averaged"] == 3 and callback.state_dict()["latest_update_epoch"] == 3


def test_the_epoch_of_statistics_runs_no_backward() -> None:
    class Count(Callback):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, int]] = []

        def on_before_zero_grad(self, trainer: Any, *args: Any) -> None:
            self.calls.append(("zero", trainer.current_epoch))

        def on_after_backward(self, trainer: Any, *args: Any) -> None:
            self.calls.append(("backward", trainer.current_epoch))

        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            self.calls.append(("step", trainer.current_epoch))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.calls.append(("end" if "loss" in outputs else "empty", trainer.current_epoch))

    count = Count()
    trainer(max_epochs=1, callbacks=[swa(swa_epoch_start=1), count]).fit(Normed(), batches(2))
    training = [(name, 0) for name in ("zero", "backward", "step", "end")]
    assert count.calls == [*training, *training, ("end", 1), ("end", 1)]


@pytest.mark.parametrize("fails_at", [(1, 2), (2, 0), (3, 5), (4, 0), (4, 3)])
def test_a_fit_goes_on_after_an_exception(tmp_path: Path, fails_at: tuple[int, int]) -> None:
    def fit(model: Normed, ckpt_path: Any = None) -> None:
        rescue = OnExceptionCheckpoint(tmp_path)
        made = trainer(max_epochs=4, callbacks=[swa(), rescue], enable_checkpointing=True)
        made.fit(model, batches(6), ckpt_path=ckpt_path)

    whole, broken, resumed = Normed(), Normed(fails_at), Normed()
    fit(whole)
    with pytest.raises(RuntimeError, match="power"):
        fit(broken)
    assert broken.net[1].momentum == 0.3
    fit(resumed, tmp_path / "on_exception.ckpt")
    assert broken.losses + resumed.losses == whole.losses
    assert resumed.net[1].momentum == 0.3
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_function_of_the_users_averages() -> None:
    model = Plain()
    callback = swa(avg_fn=lambda average, weights, n: torch.maximum(average, weights), swa_epoch_start=1)
    starts: list[Any] = []
    model.on_train_epoch_start = lambda: starts.append([p.detach().clone() for p in model.parameters()])  # type: ignore[method-assign]
    trainer(max_epochs=3, callbacks=[callback]).fit(model, batches(3))
    for weights, *seen in zip(model.parameters(), *starts, strict=True):
        assert torch.equal(weights, torch.stack(seen).amax(0))


def test_without_an_end_the_average_is_of_all_epochs_run() -> None:
    model, callback = Plain(), swa(swa_epoch_start=1)
    trainer(max_epochs=-1, max_steps=9, callbacks=[callback]).fit(model, batches(3))
    assert callback.n_averaged == 3 and callback.swa_end == float("inf")
    assert all(map(torch.equal, model.parameters(), callback._average_model.parameters()))


def test_its_state_under_lightnings_keys() -> None:
    callback = swa()
    made = trainer(max_epochs=3, callbacks=[callback])
    made.fit(Plain(), batches(2))
    state = callback.state_dict()
    assert set(state) == {"n_averaged", "latest_update_epoch", "scheduler_state", "average_model_state"}
    again = swa()
    again.setup(made, Plain(), "fit")
    again.load_state_dict(state)
    assert again._init_n_averaged == 2 and again._latest_update_epoch == 2
    assert all(map(torch.equal, again._average_model.parameters(), callback._average_model.parameters()))
    assert swa().state_dict()["average_model_state"] is None


def test_a_checkpoint_without_its_state_is_warned_of(tmp_path: Path) -> None:
    plain = trainer(max_epochs=2)
    plain.fit(Plain(), batches(2))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="begins in epoch 2"):
        trainer(max_epochs=3, callbacks=[swa()]).fit(Plain(), batches(2), ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.parametrize(
    "options",
    [
        {"swa_lrs": 0},
        {"swa_lrs": -0.1},
        {"swa_lrs": [0.1, 1]},
        {"swa_epoch_start": 0},
        {"swa_epoch_start": 1.5},
        {"annealing_strategy": "exp"},
        {"avg_fn": 3},
        {"device": 0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(options))):
        swa(**options)


def test_modules_that_cannot_be_averaged_are_refused() -> None:
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(MisconfigurationException, match="one optimizer"):
        trainer(max_epochs=2, callbacks=[swa()]).fit(Two(), batches(1))
    with pytest.raises(MisconfigurationException, match="fraction"):
        trainer(max_epochs=-1, max_steps=3, callbacks=[swa(swa_epoch_start=0.5)]).fit(Plain(), batches(1))
