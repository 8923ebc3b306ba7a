"""OnExceptionCheckpoint: written by an exception, removed by a run that ends well, good to go on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, rows, trainer
from torch.utils.data import DataLoader, Dataset

from lit_fast.callbacks import OnExceptionCheckpoint
from lit_fast.errors import MisconfigurationException


class Fails(Plain):
    """Raises in `hook` of batch 3 of the second epoch."""

    def __init__(self, hook: str) -> None:
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
        self.hook = hook

    def _maybe_fail(self, hook: str, batch_idx: int) -> None:
        if hook == self.hook and self.current_epoch == 1 and batch_idx == 3:
            raise RuntimeError("power is out")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._maybe_fail("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._maybe_fail("on_train_batch_end", batch_idx)


class FailingRows(Dataset[Any]):
    """Raises at the 13th sample of the second epoch, where `fails`."""

    def __init__(self, fails: bool) -> None:
        self.rows, self.fails, self.read = rows(20), fails, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        if self.fails and self.read > 20 + 12:
            raise RuntimeError("power is out")
        return self.rows[index]


def fit(tmp_path: Path, model: Any, ckpt_path: Any = None, window: int = 1, fails: bool = False) -> None:
    torch.manual_seed(3)
    rescue = OnExceptionCheckpoint(tmp_path / "rescue", "state")
    made = trainer(max_epochs=3, callbacks=[rescue], enable_checkpointing=True, accumulate_grad_batches=window)
    made.fit(model, DataLoader(FailingRows(fails), batch_size=4, shuffle=True), ckpt_path=ckpt_path)


@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end", "loader"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_run_goes_on_from_it_as_if_nothing_had_been(tmp_path: Path, hook: str, window: int) -> None:
    whole = Fails("")
    fit(tmp_path, whole, window=window)
    path = tmp_path / "rescue" / "state.ckpt"
    assert not path.exists()

    with pytest.raises(RuntimeError, match="power"):
        fit(tmp_path, Fails(hook), window=window, fails=hook == "loader")
    done = 8 if hook != "on_train_batch_end" else 9  # batches of 15
    per_epoch = math.ceil(5 / window)
    assert torch.load(path, weights_only=True)["global_step"] == per_epoch + (done - 5) // window

    resumed = Fails("")
    fit(tmp_path, resumed, path, window=window)
    assert len(resumed.losses) == 15 - done
    for ours, uninterrupted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, uninterrupted)
    assert not path.exists()  # that run ended well


def test_paths_and_names(tmp_path: Path) -> None:
    assert OnExceptionCheckpoint(".").ckpt_path == "./on_exception.ckpt"
    with pytest.raises(MisconfigurationException, match="needs a name"):
        OnExceptionCheckpoint(tmp_path, "")
