"""The loop: limits, when it validates, logs and stops, and what its data may be."""

from __future__ import annotations

import copy
import csv
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import NoLength, Plain, batches, fitted, shuffled, trainer

import lit_fast
from lit_fast import step
from lit_fast.errors import DataError, MisconfigurationException
from lit_fast.loggers import CSVLogger
from lit_fast.states import TrainerFn


class Validates(Plain):
    """Remembers after how many training batches each validation began."""

    def __init__(self) -> None:
        super().__init__()
        self.validated_after: list[int] = []

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_after.append(len(self.losses))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))


# -- how long


@pytest.mark.parametrize(
    "options,steps,epochs",
    [
        ({"max_steps": 7}, 7, 2),
        ({"max_steps": 10}, 10, 2),
        ({"max_epochs": 3}, 15, 3),
        ({"max_epochs": 3, "max_steps": 4}, 4, 1),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, 3),
        ({"max_epochs": 2, "limit_train_batches": 0.4}, 4, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6, 2),
        ({"max_epochs": 0}, 0, 0),
        ({"max_steps": 0}, 0, 0),
    ],
)
def test_limits(options: dict[str, Any], steps: int, epochs: int) -> None:
    made = fitted(Plain(), batches(5), **options)
    assert (made.global_step, made.current_epoch) == (steps, epochs)


@pytest.mark.parametrize(
    "options,steps",
    [({}, 3), ({"min_steps": 8}, 8), ({"min_epochs": 2}, 10), ({"min_steps": 4, "min_epochs": 1}, 5)],
)
def test_should_stop_waits_for_the_minimum(options: dict[str, Any], steps: int) -> None:
    class Stops(Plain):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step == 3:
                self.trainer.should_stop = True

    made = fitted(Stops(), batches(5), max_epochs=4, **options)
    assert made.global_step == steps


def test_estimated_stepping_batches_asks_for_the_data_once() -> None:
    class Asks(Plain):
        asked = 0

        def train_dataloader(self) -> Any:
            self.asked += 1
            return batches(5)

        def configure_optimizers(self) -> Any:
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    for options, expected in (
        ({"max_epochs": 3}, 15),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 9),
        ({"max_epochs": 3, "max_steps": 4}, 4),
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": -1, "max_steps": 3}, 3),
    ):
        model = Asks()
        trainer(**options).fit(model)
        assert model.estimate == expected
        assert model.asked == 1


# -- validation


@pytest.mark.parametrize(
    "options,after",
    [
        ({}, [6, 12]),
        ({"val_check_interval": 2}, [2, 4, 6, 8, 10, 12]),
        ({"val_check_interval": 4}, [4, 10]),
        ({"val_check_interval": 0.5}, [3, 6, 9, 12]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [4, 8, 12]),
        ({"val_check_interval": 8, "check_val_every_n_epoch": None}, [8]),
        ({"check_val_every_n_epoch": 2}, [12]),
        ({"limit_val_batches": 0}, []),
        ({"val_check_interval": 2, "accumulate_grad_batches": 4}, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_when_it_validates(options: dict[str, Any], after: list[int]) -> None:
    model = Validates()
    fitted(model, batches(6), [batches(2, seed=2)], max_epochs=2, **options)
    assert model.validated_after == after


def test_interval_longer_than_an_epoch() -> None:
    with pytest.raises(MisconfigurationException, match="would never validate"):
        fitted(Validates(), batches(3), [batches(1)], max_epochs=1, val_check_interval=4)
    with pytest.raises(MisconfigurationException, match="is a fraction, but the training data has no length"):
        fitted(Validates(), NoLength(batches(3)), [batches(1)], max_epochs=1, val_check_interval=0.5)


def test_validation_changes_no_loss() -> None:
    quiet, busy = Plain(), Validates()
    fitted(quiet, batches(6), max_epochs=4)
    fitted(busy, batches(6), [batches(2, seed=2)], max_epochs=4, val_check_interval=1)
    assert busy.losses == quiet.losses


# -- logging


def csv_rows(root: Path) -> list[dict[str, str]]:
    with next(root.glob("**/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


class Logs(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 7}])
def test_rows_of_the_csv_file(options: dict[str, Any], tmp_path: Path) -> None:
    model = Logs()
    every = options.get("log_every_n_steps", 50)
    window = options.get("accumulate_grad_batches", 1)
    made = fitted(model, batches(30), max_steps=125, logger=CSVLogger(tmp_path), **options)
    rows = csv_rows(tmp_path)
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(every, made.global_step + 1, every))
    for row in rows:
        expected = model.losses[int(row["step"]) * window - 1]
        assert float(row["loss"]) == expected


def test_events_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lit_fast.loggers import TensorBoardLogger

    model = Logs()
    fitted(model, batches(30), max_steps=160, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.glob("**/events.*")).parent))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == [50, 100, 150]
    assert [scalar.value for scalar in scalars] == [model.losses[step - 1] for step in (50, 100, 150)]


def test_skipping_the_rest_of_an_epoch_counts_no_step() -> None:
    class Skips(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    made = fitted(Skips(), batches(5), max_epochs=2)
    assert made.global_step == 6
    assert made.fit_loop.windows_completed() == 6


# -- data


def test_no_data() -> None:
    with pytest.raises(MisconfigurationException, match=r"No training data: .* pass trainer.fit\(model"):
        fitted(Plain(), None, max_epochs=1)


@pytest.mark.parametrize("data", [3, object()])
def test_data_that_cannot_be_iterated(data: Any) -> None:
    with pytest.raises(DataError, match=f"{type(data).__name__}, which cannot be iterated"):
        fitted(Plain(), data, max_epochs=1)


@pytest.mark.parametrize("data", [[], shuffled(3, batch_size=4, drop_last=True)], ids=["list", "loader"])
def test_empty_data(data: Any) -> None:
    with pytest.warns(UserWarning, match="The training data is empty"):
        made = fitted(Plain(), data, max_epochs=2)
    assert made.global_step == 0 and made.current_epoch == 0


def test_data_without_a_length_and_without_a_batch() -> None:
    with pytest.raises(DataError, match="gave no batch"):
        fitted(Plain(), NoLength([]), max_epochs=2)


def test_a_generator_is_read_once() -> None:
    """With only max_steps to end it, this would spin for ever."""
    with pytest.raises(DataError, match=r"gave no batch in epoch 1.*read only once"):
        fitted(Plain(), (batch for batch in batches(3)), max_steps=5)
    made = fitted(Plain(), (batch for batch in batches(3)), max_epochs=1)
    assert made.global_step == 3


def test_data_that_ends_before_its_length() -> None:
    class Boasts(NoLength):
        def __len__(self) -> int:
            return 10

    model = Validates()
    with pytest.warns(UserWarning, match="ended after 6 of the 10 batches"):
        made = fitted(model, Boasts(batches(6)), [batches(1)], max_epochs=2)
    assert made.global_step == 12 and made.current_epoch == 2
    assert model.validated_after == [6, 12]


def test_fewer_batches_than_the_limit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = fitted(Plain(), NoLength(batches(3)), max_epochs=2, limit_train_batches=10)
    assert made.global_step == 6


def test_plateau_scheduler_by_step() -> None:
    class Plateau(Validates):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1000)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": self.scheduler, "interval": "step", "frequency": 2, "monitor": "val", "strict": False,
                },
            }  # fmt: skip

    model = Plateau()
    fitted(model, batches(6), [batches(1)], max_epochs=2, val_check_interval=2)
    assert model.scheduler.last_epoch == 6


def test_a_fit_after_a_validate_reads_training_values(tmp_path: Path) -> None:
    class Both(Logs, Validates): ...

    model = Both()
    made = lit_fast.Trainer(
        accelerator="cpu", logger=CSVLogger(tmp_path), max_epochs=1, log_every_n_steps=2, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made.validate(model, [batches(1)], verbose=False)
    made.fit(model, batches(4))
    assert [row["step"] for row in csv_rows(tmp_path) if row["loss"]] == ["2", "4"]


class Clock:
    """Seconds that pass as a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("every", [{"seconds": 10}, "00:00:00:10", timedelta(seconds=10)])
def test_validation_by_the_clock(every: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for room in ("loop", "schedule"):
        monkeypatch.setattr(f"lit_fast.{room}.time", clock)

    class Slow(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.now += 4
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 100  # the time that validation takes does not count
            self.validated.append(self.trainer.global_step)

    model = Slow()
    model.validated = []
    made = fitted(model, batches(5), [batches(1)], max_epochs=2, val_check_interval=every, num_sanity_val_steps=0)
    assert model.validated == [3, 6, 9] and made.val_check_batch is None
    model.validated = []
    fitted(
        model, batches(5), [batches(1)], max_epochs=3, val_check_interval=every, check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
    )  # fmt: skip
    assert model.validated == [6, 9], "only in the epochs that validate at all"


# -- batches that are None


class Watched(Plain):
    """What is called for each batch, as Lightning 2.6.6 calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called.append(("transfer", batch is None))
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.called.append(("start", batch_idx))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.called.append(("end", batch_idx, outputs is None, batch is None, self.trainer.global_step))


@pytest.mark.parametrize("window,steps", [(1, [1, 1, 2, 2, 3]), (2, [0, 0, 0, 0, 1])])
def test_a_batch_that_is_none_is_skipped(window: int, steps: list[int]) -> None:
    first, second, third = batches(3)
    model = Watched()
    with pytest.warns(UserWarning, match="a batch that is None") as heard:
        made = fitted(model, [first, None, second, None, third], max_epochs=1, accumulate_grad_batches=window)
    assert [("returned None" in str(warning.message)) for warning in heard].count(True) == 0
    expected: list[Any] = []
    for index, (nothing, taken) in enumerate(zip([False, True, False, True, False], steps, strict=True)):
        expected += [("transfer", nothing), *([] if nothing else [("start", index)])]
        expected.append(("end", index, nothing, nothing, taken))
    assert model.called == expected and made.global_step == steps[-1]
    if window == 1:
        reference = Plain()
        fitted(reference, [first, second, third], max_epochs=1)
        assert torch.equal(model.net[0].weight, reference.net[0].weight)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
def test_a_batch_that_a_hook_makes_none_is_skipped(hook: str) -> None:
    """Where the loader gave None and the hook makes a batch of it, a step is taken."""
    data = batches(3)
    results = iter([data[0], None, data[2]])
    model = type("Hooked", (Watched,), {hook: lambda self, batch, *_: next(results)})()
    with pytest.warns(UserWarning, match="or a transfer hook made it so"):
        made = fitted(model, [data[0], data[1], None], max_epochs=1)
    assert [event for event in model.called if event[0] != "transfer"] == [
        ("start", 0), ("end", 0, False, False, 1), ("end", 1, True, True, 1), ("start", 2), ("end", 2, False, False, 2),
    ]  # fmt: skip
    reference = Plain()
    fitted(reference, [data[0], data[2]], max_epochs=1)
    assert made.global_step == 2 and torch.equal(model.net[0].weight, reference.net[0].weight)


def test_a_step_without_transfer_hooks_has_nothing_to_skip() -> None:
    made = fitted(Plain(), batches(1), max_epochs=1)
    assert made.fit_loop.plans.kind(True, True, 1).run is step.inline  # type: ignore[union-attr]


def test_schedulers_step_also_after_a_batch_that_is_none() -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    with pytest.warns(UserWarning, match="is None"):
        made = fitted(Scheduled(), [batches(1)[0], None, None], max_epochs=1)
    assert made.optimizers[0].param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("saved_after", [0, 1])
def test_what_is_due_after_the_step_of_a_checkpoint_sees_that_steps_values(saved_after: int, tmp_path: Path) -> None:
    """Saved in `on_train_batch_end`, so that the resumed run begins with the row and the plateau scheduler."""

    class Watched(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", float(batch_idx), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            watch = {"scheduler": scheduler, "monitor": "loss_step", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": watch}

    def finish(folder: str, ckpt_path: Path | None) -> tuple[float, list[tuple[str, str]]]:
        logger, model = CSVLogger(tmp_path / folder), Watched()
        made = trainer(max_epochs=1, logger=logger, log_every_n_steps=1)
        made.fit(model, batches(4), ckpt_path=ckpt_path)
        with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
            rows = [(row["step"], row["loss_step"]) for row in csv.DictReader(file) if row["loss_step"]]
        return made.optimizers[0].param_groups[0]["lr"], rows

    rate, rows = finish("whole", None)
    assert rate == 0.125  # worse after each step but the first
    assert finish("resumed", tmp_path / f"{saved_after}.ckpt") == (rate, rows[saved_after:])


def test_iterators_are_begun_where_lightning_begins_them() -> None:
    """What they draw decides the order of shuffled data, and what hooks draw; recorded with Lightning 2.6.6."""
    told: list[str] = []

    class Told(torch.utils.data.DataLoader[Any]):
        def __init__(self, name: str) -> None:
            super().__init__(torch.utils.data.TensorDataset(torch.randn(4, 8)), batch_size=2)
            self.name = name

        def __iter__(self) -> Any:
            told.append(self.name)
            return super().__iter__()

    class Tells(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_train_start(self) -> None:
            told.append("on_train_start")

        def on_train_epoch_start(self) -> None:
            told.append("on_train_epoch_start")

        def on_validation_start(self) -> None:
            told.append("on_validation_start")

    fitted(Tells(), Told("train"), Told("val"), max_epochs=2, num_sanity_val_steps=0)
    epoch = ["val", "on_validation_start"]
    first = ["train", "on_train_start", "on_train_epoch_start"]
    assert told == [*first, *epoch, "on_train_epoch_start", "train", *epoch]


@pytest.mark.parametrize(("more", "draws"), [(0, 1), (1, 2 + 1)])
def test_a_later_fit_draws_for_new_data_once_more(more: int, draws: int) -> None:
    """As Lightning does: a seed for the new data, then for each epoch one for workers and one for the order."""
    module, again = Plain(), shuffled(8)
    done = fitted(module, shuffled(8), max_epochs=1)
    done.fit_loop.max_epochs += more
    torch.manual_seed(3)
    done.fit(module, again)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(draws):
        torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(after, torch.get_rng_state())


def test_a_trainer_that_has_run_can_be_copied() -> None:
    done = fitted(Plain(), shuffled(8), max_epochs=1)
    other = copy.deepcopy(done)
    other.fit_loop.max_epochs = 2
    other.fit(Plain(), shuffled(8))
    assert (done.current_epoch, other.current_epoch) == (1, 2)


def test_setup_and_teardown_are_told_the_stage() -> None:
    told: list[Any] = []

    class Told(Plain):
        def setup(self, stage: str) -> None:
            told.append(stage)

        def teardown(self, stage: str) -> None:
            told.append(stage)

    fitted(Told(), batches(1), max_epochs=1)
    assert told == ["fit", "fit"] and all(stage is TrainerFn.FITTING for stage in told)


def test_a_gathered_integer_has_32_bits() -> None:
    module = Plain()
    fitted(module, batches(1), max_epochs=1)
    gathered = module.all_gather({"count": 3, "share": 0.5, "flag": True})
    assert [value.dtype for value in gathered.values()] == [torch.int32, torch.float32, torch.bool]
