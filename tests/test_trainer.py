"""The Trainer's face: what it refuses, what it leaves behind, and what it keeps in memory."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import weakref
from pathlib import Path
from typing import Any

import full_disk_program
import new_process
import pytest
import torch
from heart_models import QUIET, NoLength, Plain, batches, fitted, shuffled, trainer
from torch import nn

import lit_fast
from lit_fast.checkpoint import io
from lit_fast.errors import LitFastError, MisconfigurationException

# -- what cannot be fitted


def test_no_training_step() -> None:
    class NoStep(lit_fast.LightningModule):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(MisconfigurationException, match=r"NoStep defines no training_step\(self, batch, batch_idx\)"):
        fitted(NoStep(), batches(1))


def test_no_configure_optimizers() -> None:
    class NoOptimizer(lit_fast.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any: ...

    with pytest.raises(MisconfigurationException, match=r"NoOptimizer defines no configure_optimizers\(self\)"):
        fitted(NoOptimizer(), batches(1))


@pytest.mark.parametrize("model", [nn.Linear(1, 1), 3, None, Plain], ids=["module", "int", "none", "class"])
def test_no_lightning_module(model: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"it needs a lit_fast\.LightningModule.*lit-fast run"):
        fitted(model, batches(1))


def test_a_datamodule_and_loaders() -> None:
    class Data(lit_fast.LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches(2)

    made = trainer(max_epochs=1)
    with pytest.raises(MisconfigurationException, match="Both a datamodule and dataloaders"):
        made.fit(Plain(), batches(1), datamodule=Data())
    made.fit(Plain(), Data())
    assert made.global_step == 2


def test_a_datamodule_stays_attached_but_its_loaders_do_not() -> None:
    """As in Lightning: a later run takes the loaders that it is given, or the module's."""
    told: list[str] = []

    class Data(lit_fast.LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches(2)

        def test_dataloader(self) -> Any:
            raise AssertionError("nobody asked for it")

        def setup(self, stage: str) -> None:
            told.append(stage)

    class Tested(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    made, model, data = trainer(max_epochs=1), Tested(), Data()
    made.fit(model, datamodule=data)
    made.test(model, batches(3))
    assert made.datamodule is data and made.num_test_batches == [3] and told == ["fit", "test"]
    with pytest.raises(MisconfigurationException, match="No test data"):
        made.test(model)


def test_what_is_not_there() -> None:
    with pytest.raises(MisconfigurationException, match="needs a model"):
        trainer().save_checkpoint("a.ckpt")


def test_every_error_is_of_one_tree() -> None:
    assert issubclass(MisconfigurationException, LitFastError) and issubclass(MisconfigurationException, ValueError)


def test_an_error_in_a_step_is_told_and_raised() -> None:
    told: list[BaseException] = []

    class Listens(lit_fast.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            told.append(exception)

    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("mine")

    made = trainer(max_epochs=1, callbacks=Listens())
    with pytest.raises(KeyError, match="mine"):
        made.fit(Breaks(), batches(1))
    assert len(told) == 1 and made.interrupted and made.state.stage is None


def test_fit_again_after_an_error() -> None:
    class BreaksOnce(Plain):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and not self.broken:
                self.broken = True
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    model, made = BreaksOnce(), trainer(max_epochs=2)
    with pytest.raises(KeyError):
        made.fit(model, batches(4))
    made.fit(model, batches(4))
    assert made.current_epoch == 2 and made.state.finished


# -- attributes


def test_attributes_during_a_fit() -> None:
    seen: list[Any] = []

    class Looks(Plain):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            t = self.trainer
            seen.append((t.current_epoch, t.global_step, t.is_last_batch, t.training, t.num_training_batches))
            assert self.device == torch.device("cpu") and t.model is self and t.is_global_zero

    fitted(Looks(), batches(2), max_epochs=2)
    assert seen == [(0, 1, False, True, 2), (0, 2, True, True, 2), (1, 3, False, True, 2), (1, 4, True, True, 2)]
    seen.clear()
    fitted(Looks(), NoLength(batches(2)), max_epochs=1)
    assert seen == [(0, 1, False, True, float("inf")), (0, 2, True, True, float("inf"))]


# -- a full disk


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path) -> None:
    done = new_process.run(Path(full_disk_program.__file__), tmp_path)
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert "CheckpointError" in last_line and "epoch=2-step=9.ckpt" in last_line, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=1-step=6.ckpt"]
    assert io.load(tmp_path / "epoch=1-step=6.ckpt")["global_step"] == 6


# -- memory


def test_nothing_outlives_its_trainer(tmp_path: Path) -> None:
    class Validates(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.batch = weakref.ref(batch[0])
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    model = Validates()
    made = lit_fast.Trainer(
        accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    made.fit(model, shuffled(12), [batches(1)])
    gc.collect()
    assert model.batch() is None, "the last batch is not kept after the fit"
    references = [weakref.ref(made), weakref.ref(model), weakref.ref(made.optimizers[0]), weakref.ref(made.fit_loop)]
    del made, model
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_the_last_batch_is_let_go_after_an_error_too() -> None:
    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.batch = weakref.ref(batch[0])
            raise KeyError("mine")

    model, made = Breaks(), trainer(max_epochs=1)
    with contextlib.suppress(KeyError):
        made.fit(model, shuffled(12))
    gc.collect()
    assert model.batch() is None


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def rss() -> int:
    """Bytes of memory of this process that are resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux' /proc")
def test_two_thousand_steps_do_not_grow() -> None:
    class Watches(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
            return loss

        def on_train_epoch_end(self) -> None:
            self.counts.append((live_tensors(), rss()))

    model = Watches(torch.optim.AdamW)
    model.counts = []
    fitted(model, batches(250), max_epochs=10, gradient_clip_val=1.0)
    tensors = [count for count, _ in model.counts]
    sizes = [size for _, size in model.counts]
    assert set(tensors[1:]) == {tensors[1]}
    # 2,000 steps that kept one 0-dim tensor each (about 400 bytes with its storage) would grow by 0.8 MB
    assert sizes[-1] - sizes[1] < 400_000


def test_quiet_options_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lit_fast.Trainer(**QUIET, max_epochs=1).fit(Plain(), batches(2))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
