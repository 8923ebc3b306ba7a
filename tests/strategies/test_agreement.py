"""What two processes of a fit agree on: who writes, when to stop, to save, to validate; and what that costs a step."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

import lit_fast
from lit_fast.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lit_fast.strategies import DDPStrategy

pytestmark = pytest.mark.dist


class Net(lit_fast.LightningModule):
    """Its losses differ between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 4})
        self.layer = nn.Linear(4, 1)
        self.steps: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append(batch_idx)
        loss = self.layer(batch).square().mean()
        self.log("loss", loss + self.global_rank, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean() + self.global_rank)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", 1.0 + self.global_rank, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return [torch.randn(2, 4, generator=generator) for _ in range(batches)]


def trainer_of(**options: Any) -> lit_fast.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 2, "strategy": "ddp", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
    }  # fmt: skip
    return lit_fast.Trainer(**{**quiet, **options})


# -- who writes


def everything_that_writes(root: str) -> tuple[list[str], Any]:
    written: list[str] = []
    if os.environ["RANK"] == "1":
        _watch_writes(root, written)
    loggers = [lit_fast.loggers.CSVLogger(root, name="csv"), lit_fast.loggers.TensorBoardLogger(root, name="board")]
    best = ModelCheckpoint(monitor="val", save_top_k=2, save_last="link", every_n_train_steps=2)
    callbacks = [
        best,
        ModelCheckpoint(os.path.join(root, "newest")),
        lit_fast.callbacks.OnExceptionCheckpoint(os.path.join(root, "rescue")),
        lit_fast.callbacks.LearningRateMonitor(),
    ]
    trainer = trainer_of(
        default_root_dir=root, logger=loggers, callbacks=callbacks, max_epochs=2, log_every_n_steps=1,
        enable_checkpointing=True, enable_progress_bar=True, enable_model_summary=True,
    )  # fmt: skip
    model = Net()
    trainer.fit(model, data(4), data(2))
    best.to_yaml()
    seen = (best.best_model_path, sorted(best.best_k_models), best.last_model_path, trainer.log_dir)
    trainer.save_checkpoint(os.path.join(root, "by_hand.ckpt"))
    trainer.test(model, data(2))
    trainer.test(dataloaders=data(2), ckpt_path="best")
    model.print("from one process")
    return written, (seen, [logger.log_dir for logger in loggers], trainer.test(model, data(2), verbose=False))


def _watch_writes(root: str, written: list[str]) -> None:
    import sys

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[0].startswith(root):
            by_mode = isinstance(args[1], str) and set(args[1]) & set("wax+")
            if by_mode or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                written.append(args[0])
        if event in ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.rmdir"):
            written.extend(f"{event} {path}" for path in args[:2] if isinstance(path, str) and path.startswith(root))

    sys.addaudithook(audit)


def test_one_process_writes_and_all_know_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "csv" / "version_3").mkdir(parents=True)
    (_, first), (written, second) = run_ranks(everything_that_writes, 2, str(tmp_path), timeout=120.0)
    assert written == []
    assert first == second
    (best, kept, last, log_dir), folders, results = first
    assert log_dir == folders[0] == str(tmp_path / "csv" / "version_4")
    assert results == [{"test": 1.5}]
    assert [path for path in (best, last, *kept) if not os.path.exists(path)] == [] and len(kept) == 2
    assert (tmp_path / "csv" / "version_4" / "metrics.csv").exists()
    assert not (tmp_path / "csv" / "version_5").exists()
    out = capfd.readouterr().out
    assert out.count("from one process") == 1
    assert out.count("Test metric") == 2


# -- when to stop


class OneStops(lit_fast.Callback):
    """Process 1 alone asks for something after a batch."""

    def __init__(self, batch: int, what: str = "stop", rank: int = 1) -> None:
        self.batch, self.what, self.rank = batch, what, rank

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            if self.what == "stop":
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), getattr(signal, self.what))


def stops() -> dict[str, Any]:
    """Each of these fits ends because of one process."""
    seen: dict[str, Any] = {}

    def fit(name: str, callbacks: list[Any], batches: int = 12, **options: Any) -> Net:
        model = Net()
        torch.manual_seed(1)
        trainer = trainer_of(callbacks=callbacks, **{"max_epochs": 1, **options})
        trainer.fit(model, data(batches), data(1))
        seen[name] = trainer.global_step, trainer.current_epoch
        return model

    fit("should_stop", [OneStops(3)])
    fit("min_steps", [OneStops(3)], min_steps=8, min_epochs=0)
    fit("accumulating", [OneStops(3)], accumulate_grad_batches=3)
    fit("max_time", [], max_time={"milliseconds": 30 if os.environ["RANK"] == "0" else 10**9}, max_epochs=10**6)
    early = [EarlyStopping("val", patience=1, stopping_threshold=0.5, mode="max")]
    fit("early", early, max_epochs=9)
    seen["stopped_epoch"] = early[0].stopped_epoch
    validations = CountValidations()
    fit("by_time", [validations, Slow()], batches=30, val_check_interval={"milliseconds": 40}, num_sanity_val_steps=0,
        check_val_every_n_epoch=None)  # fmt: skip
    seen["validated_after"] = validations.steps
    return seen


class CountValidations(lit_fast.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(trainer.global_step)


class Slow(lit_fast.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.01)


def test_all_stop_and_validate_after_the_same_step() -> None:
    first, second = run_ranks(stops, 2)
    for name in ("should_stop", "min_steps", "accumulating", "early", "stopped_epoch", "validated_after"):
        assert first[name] == second[name], name
    assert first["should_stop"] == (5, 1)  # asked for after step 4: it travels with the gradients of step 5
    assert first["min_steps"] == (8, 1)
    assert first["accumulating"] == (2, 1)  # asked for in batch 4: the window of batches 4 to 6 carries it
    assert first["max_time"] == second["max_time"] and first["max_time"][0] > 0
    assert first["early"] == (12, 1)  # the value of process 1 alone is beyond the threshold
    assert len(first["validated_after"]) >= 2


def saves_by_time(root: str) -> list[Any]:
    """Two callbacks, by the clock of the first process."""
    saved = [
        ModelCheckpoint(
            os.path.join(root, name), "{step}", save_top_k=-1, train_time_interval=timedelta(milliseconds=ms)
        )
        for name, ms in (("a", 50), ("b", 80))
    ]
    model = Net()
    trainer = trainer_of(callbacks=[*saved, Slow()], enable_checkpointing=True, max_epochs=1, default_root_dir=root)
    trainer.fit(model, data(30))
    return [callback.best_model_path for callback in saved]


def test_checkpoints_by_time_are_saved_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_ranks(saves_by_time, 2, str(tmp_path))
    assert first == second
    assert all(len(list((tmp_path / name).glob("*.ckpt"))) >= 2 for name in "ab")


# -- signals


def ends_by(signal_name: str, rank: int, root: str, batch: int) -> Any:
    trainer = trainer_of(
        callbacks=[OneStops(batch, signal_name, rank)], enable_checkpointing=True, default_root_dir=root, max_epochs=3
    )
    model = Net()
    kinds = (lit_fast.errors.SIGTERMException, SystemExit)
    with pytest.raises(kinds) as ended:
        trainer.fit(model, data(8), data(1))
    return trainer.global_step, type(ended.value).__name__, ended.value.code


@pytest.mark.parametrize(
    "name,rank,batch,step,code", [("SIGTERM", 1, 2, 4, 143), ("SIGINT", 0, 2, 4, 1), ("SIGTERM", 1, 7, 8, 143)]
)
def test_a_signal_to_one_process_ends_all_with_one_checkpoint(
    tmp_path: Path, name: str, rank: int, batch: int, step: int, code: int
) -> None:
    first, second = run_ranks(ends_by, 2, name, rank, str(tmp_path), batch)
    assert first == second
    assert first[0] == step and first[2] == code
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == step


# -- what a step costs


class Counted:
    """Counts what is called of torch.distributed, by name."""

    names = ("all_reduce", "broadcast", "all_gather", "gather", "reduce", "barrier", "all_gather_object",
             "broadcast_object_list", "all_to_all", "reduce_scatter", "all_gather_into_tensor")  # fmt: skip

    def __init__(self) -> None:
        self.calls: list[str] = []
        for name in self.names:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return counting


class Marks(lit_fast.Callback):
    """How many calls each step made."""

    def __init__(self, counted: Counted) -> None:
        self.counted, self.per_step = counted, []

    def on_train_batch_start(self, *args: Any) -> None:
        self.per_step.append(len(self.counted.calls))


def calls_of_steps(root: str) -> list[list[str]]:
    counted = Counted()
    marks = Marks(counted)
    callbacks = [
        marks, lit_fast.callbacks.LearningRateMonitor(), Timer("00:01:00:00"), EarlyStopping("loss"),
        ModelCheckpoint(root, train_time_interval=timedelta(hours=1)), ModelCheckpoint(root, every_n_train_steps=1000),
    ]  # fmt: skip

    class Synced(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("synced", 1.0, sync_dist=True, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = trainer_of(
        callbacks=callbacks, enable_checkpointing=True, enable_progress_bar=True, default_root_dir=root, max_epochs=1,
        logger=lit_fast.loggers.CSVLogger(root), log_every_n_steps=5, max_time="00:02:00:00",
        val_check_interval={"hours": 1}, check_val_every_n_epoch=None,
        strategy=DDPStrategy(bucket_cap_mb=25),  # else the first steps measure the network
    )  # fmt: skip
    trainer.fit(Synced(), data(12), data(1))
    edges = marks.per_step
    return [counted.calls[a:b] for a, b in pairwise(edges)]


def test_a_step_has_no_collective_but_its_buckets(tmp_path: Path) -> None:
    for steps in run_ranks(calls_of_steps, 2, str(tmp_path)):
        later = steps[2:]  # the first step learns in which order gradients arrive
        assert [calls for number, calls in enumerate(later, start=2) if (number + 1) % 5] == [["all_reduce"]] * 7
        assert later[2] == later[7] == ["all_reduce", "all_gather"]  # steps 5 and 10 share what is logged


# -- searches


class Searched(Net):
    """Process 1 has memory for batches of 5 at most, and its loss runs away."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 2, 0.1

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(self.global_rank)
        return torch.utils.data.DataLoader(torch.randn(64, 4, generator=generator), batch_size=self.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and len(batch) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 elephants")
        return super().training_step(batch, batch_idx)


def searches() -> Any:
    model = Searched()
    trainer = trainer_of(max_epochs=2)
    tuner = lit_fast.pytorch.tuner.Tuner(trainer)
    size = tuner.scale_batch_size(model, init_val=2)
    found = tuner.lr_find(model, num_training=20, min_lr=1e-4, max_lr=1e4)
    trainer.fit(model)
    return size, model.batch_size, model.lr, found.results, trainer.global_step


def test_searches_find_the_same_for_all() -> None:
    first, second = run_ranks(searches, 2)
    assert repr(first) == repr(second)
    size, batch_size, _, results, steps = first
    assert size == batch_size == 4
    assert len(results["lr"]) < 20  # the loss of one process stopped both
    assert steps == 32


# -- the end of an epoch


class Skips(Net):
    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 and self.global_rank in self.ranks else None


def leaves() -> Any:
    together = trainer_of(max_epochs=2, accumulate_grad_batches=2)
    together.fit(Skips((0, 1)), data(8), data(1))
    alone = trainer_of(max_epochs=2)
    with pytest.raises(lit_fast.errors.MisconfigurationException) as error:
        alone.fit(Skips((1,)), data(8), data(1))
    return together.global_step, together.current_epoch, str(error.value)


def test_an_epoch_is_left_by_all_or_by_none() -> None:
    first, second = run_ranks(leaves, 2)
    assert first[:2] == second[:2] == (2, 2)
    assert "1 of 2 processes (not this one)" in first[2] and "on_train_batch_start" in first[2]
    assert "1 of 2 processes (this one too)" in second[2]
