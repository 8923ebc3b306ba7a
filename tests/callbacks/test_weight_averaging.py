"""WeightAveraging and EMAWeightAveraging: formulas, when they update, checkpoints, what they cost.

That they compute what Lightning computes is in test_averaging_scenarios.py.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, trainer
from torch import Tensor, nn

from lit_fast.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lit_fast.errors import MisconfigurationException


class Watch(Callback):
    """The trained weights after every step; the module's weights at each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[Tensor]] = []
        self.validated: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append([p.detach().double().clone() for p in pl_module.parameters()])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.validated.append([p.detach().double().clone() for p in pl_module.parameters()])


class Validated(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))


def fitted(callback: WeightAveraging, epochs: int = 2, **options: Any) -> tuple[Plain, Watch]:
    model, watch = Validated(), Watch()
    options = {"num_sanity_val_steps": 0, "max_epochs": epochs, **options}
    trainer(callbacks=[callback, watch], **options).fit(model, batches(5), batches(1))
    return model, watch


def close(got: Any, wanted: list[Tensor], updates: int) -> None:
    """Within the rounding of `updates` float32 updates, of three roundings each."""
    eps = torch.finfo(torch.float32).eps
    for ours, exact in zip(got, wanted, strict=True):
        assert (ours.detach().double() - exact).abs().max() <= 3 * eps * updates * max(1.0, float(exact.abs().max()))


def test_the_moving_average_is_the_formula() -> None:
    model, watch = fitted(EMAWeightAveraging(decay=0.75))
    average = watch.trained[0]
    for step, weights in enumerate(watch.trained[1:], start=1):
        average = [0.75 * a + 0.25 * w for a, w in zip(average, weights, strict=True)]
        if step == 4:
            close(watch.validated[0], average, 4)
    close(watch.validated[-1], average, 9)
    close(model.parameters(), average, 9)


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, [0, 1, 2, 3], []),
        ({"update_every_n_steps": 2}, [0, 2], []),
        ({"update_every_n_steps": 0}, [], []),
        ({"update_starting_at_step": 2}, [2, 3], []),
        ({"update_every_n_steps": 2, "update_starting_at_step": 1}, [2], []),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 1}, [], [1, 2]),
        ({"update_starting_at_epoch": 2}, [0, 1, 2, 3], [2]),
    ],
)
def test_when_the_moving_average_is_updated(options: dict[str, int], steps: list[int], epochs: list[int]) -> None:
    callback = EMAWeightAveraging(**options)
    assert [step for step in range(4) if callback.should_update(step_idx=step)] == steps
    assert [epoch for epoch in range(3) if callback.should_update(epoch_idx=epoch)] == epochs


def test_an_average_of_epochs() -> None:
    class Epochs(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

    model, watch = fitted(Epochs(), epochs=3)
    ends = watch.trained[4::5]
    close(model.parameters(), [sum(tensors) / 3 for tensors in zip(*ends, strict=True)], 3)  # type: ignore[arg-type]


def test_a_checkpoint_holds_average_and_weights(tmp_path: Path) -> None:
    callback, saver = EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=3)
    _, watch = fitted_with(callback, saver)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["averaging_state"] == {"n_averaged": torch.tensor(3)}
    assert saved["callbacks"]["EMAWeightAveraging"] == {"latest_update_step": 3}
    assert all(map(torch.equal, (v.double() for v in saved["current_model_state"].values()), watch.trained[2]))
    first, second, third = watch.trained[:3]
    average = [0.5 * (0.5 * a + 0.5 * b) + 0.5 * c for a, b, c in zip(first, second, third, strict=True)]
    close(saved["state_dict"].values(), average, 3)


def fitted_with(callback: WeightAveraging, saver: ModelCheckpoint) -> tuple[Plain, Watch]:
    model, watch = Validated(), Watch()
    made = trainer(callbacks=[callback, watch, saver], max_epochs=1, enable_checkpointing=True)
    made.fit(model, batches(5), batches(1))
    return model, watch


def test_weights_of_another_checkpoint_begin_the_average(tmp_path: Path) -> None:
    plain = trainer(max_epochs=1)
    plain.fit(Validated(), batches(2))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback = WeightAveraging()
    made = trainer(max_epochs=1, callbacks=[callback])
    with pytest.warns(UserWarning, match="saved without WeightAveraging"):
        made.fit(Validated(), batches(2), ckpt_path=tmp_path / "plain.ckpt")
    assert callback._average_model is not None
    weights = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(callback._average_model.module.state_dict()[name], weights[name]) for name in weights)


def test_outside_a_fit_there_is_no_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(max_epochs=1, callbacks=[WeightAveraging()])
    model = Validated()
    first.fit(model, batches(2))
    first.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(callbacks=[WeightAveraging()])
    with pytest.warns(UserWarning, match="outside a fit"):
        again.validate(Validated(), batches(1), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    with caplog.at_level(logging.INFO):
        again.save_checkpoint(tmp_path / "y.ckpt")
    assert "no average outside a fit" in caplog.text
    saved = torch.load(tmp_path / "y.ckpt", weights_only=True)
    assert "averaging_state" not in saved and torch.equal(saved["state_dict"]["net.0.weight"], model.net[0].weight)


def test_an_exception_in_validation_leaves_the_trained_weights(tmp_path: Path) -> None:
    class Fails(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("no")

    model, watch = Fails(), Watch()
    made = trainer(callbacks=[EMAWeightAveraging(decay=0.9), watch], max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="no"):
        made.fit(model, batches(3), batches(1))
    assert all(map(torch.equal, (p.double() for p in model.parameters()), watch.trained[-1]))


def test_configure_model_is_called_before_the_copy() -> None:
    class Late(Validated):
        def __init__(self) -> None:
            super().__init__()
            self.late: nn.Module | None = None

        def configure_model(self) -> None:
            if self.late is None:
                self.late = nn.Linear(1, 1)

    callback = WeightAveraging()
    with pytest.warns(UserWarning, match="configure_model"):
        trainer(max_epochs=1, callbacks=[callback]).fit(Late(), batches(1))
    assert callback._average_model is not None and "module.late.weight" in callback._average_model.state_dict()


def test_weights_of_16_bits_have_an_average_of_32() -> None:
    class Half(Validated):
        def loss(self, batch: Any) -> Tensor:
            return self.net(batch).float().square().mean()

    for callback in (WeightAveraging(), EMAWeightAveraging(decay=0.99)):
        watch = Watch()
        made = trainer(callbacks=[callback, watch], max_epochs=1, precision="bf16-true")
        made.fit(Half(), batches(5))
        assert callback._average_model is not None
        average = watch.trained[0]
        for number, weights in enumerate(watch.trained[1:], start=1):
            new = 0.01 if isinstance(callback, EMAWeightAveraging) else 1 / (number + 1)
            average = [(1 - new) * a + new * w for a, w in zip(average, weights, strict=True)]
        assert {p.dtype for p in callback._average_model.module.parameters()} == {torch.float32}
        close(callback._average_model.module.parameters(), average, 5)


def test_a_validation_does_not_round_the_average_to_16_bits(tmp_path: Path) -> None:
    class Half(Validated):
        def loss(self, batch: Any) -> Tensor:
            return self.net(batch).float().square().mean()

    class SavesWhileSwapped(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    averages = []
    for every in (1, 5):
        callback = EMAWeightAveraging(decay=0.999)
        options: dict[str, Any] = {"val_check_interval": every, "num_sanity_val_steps": 0, "precision": "bf16-true"}
        made = trainer(callbacks=[callback, SavesWhileSwapped()], max_epochs=1, **options)
        made.fit(Half(), batches(5), batches(1))
        assert callback._average_model is not None
        averages.append(list(callback._average_model.module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))
    saved = torch.load(tmp_path / "inside.ckpt")["state_dict"].values()
    assert all(torch.equal(a, b) for a, b in zip(averages[0], saved, strict=True))


def test_counters_among_the_buffers_are_averaged_as_in_32_bits() -> None:
    class Normed(Validated):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def loss(self, batch: Any) -> Tensor:
            return self.net(self.norm(batch)).float().square().mean()

    for make in (WeightAveraging, lambda: EMAWeightAveraging(decay=0.25)):
        counted = []
        for precision in ("32-true", "bf16-true"):
            model = Normed()
            trainer(callbacks=[make()], max_epochs=1, precision=precision).fit(model, batches(5), batches(1))
            assert model.norm.num_batches_tracked is not None
            counted.append(model.norm.num_batches_tracked.item())
        assert counted[0] == counted[1]


def test_a_step_runs_one_kernel_a_dtype_and_no_copies_of_the_weights() -> None:
    """The moving average reads and writes each weight once: torch's formula for single tensors does so three times."""
    callback = EMAWeightAveraging()
    model = Validated()
    callback.setup(None, model, "fit")
    callback.on_fit_start(None, model)
    average = callback._average_model
    assert average is not None
    average.update_parameters(model)
    with torch.profiler.profile() as profile:
        average.update_parameters(model)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_foreach_lerp_"] == 1
    assert not {"aten::mul", "aten::copy_"} & set(calls)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="averages"):
        WeightAveraging(averages=3)
    with pytest.raises(MisconfigurationException, match="avg_fn"):
        EMAWeightAveraging(avg_fn=min)
    with pytest.raises(ValueError, match="decay"):
        EMAWeightAveraging(decay=1.5)


def test_it_never_looks_at_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = trainer(max_epochs=1, callbacks=[EMAWeightAveraging()], gradient_clip_val=1.0)
        made.fit(Validated(), batches(2), batches(2))
    assert "in registers" in made.explain()
