"""Plugins that keep checkpoints: a user's own is used for everything; the thread's copy is of the moment of saving."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, trainer

from lit_fast.callbacks import ModelCheckpoint
from lit_fast.checkpoint.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lit_fast.errors import CheckpointError, MisconfigurationException


class InMemory(CheckpointIO):
    """Keeps checkpoints in a dictionary, and notes what it was asked for."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.asked: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.asked.append(("save", Path(path).name, storage_options))
        self.held[str(path)] = {**checkpoint, "state_dict": {k: v.clone() for k, v in checkpoint["state_dict"].items()}}

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.asked.append(("load", Path(path).name, weights_only))
        return self.held[str(path)]  # type: ignore[no-any-return]

    def remove_checkpoint(self, path: Any) -> None:
        self.asked.append(("remove", Path(path).name))
        del self.held[str(path)]

    def teardown(self) -> None:
        self.asked.append("teardown")


def test_a_users_plugin_saves_loads_and_removes(tmp_path: Path) -> None:
    plugin = InMemory()
    keep = ModelCheckpoint(tmp_path)
    made = trainer(enable_checkpointing=True, callbacks=[keep], max_epochs=2, plugins=[plugin])
    made.fit(Plain(), batches(3))
    assert plugin.asked == [
        ("save", "epoch=0-step=3.ckpt", None),
        ("save", "epoch=1-step=6.ckpt", None),
        ("remove", "epoch=0-step=3.ckpt"),
        "teardown",
    ]
    assert made.strategy.checkpoint_io is plugin
    plugin.asked.clear()
    made.save_checkpoint("memory://one.ckpt", storage_options={"fast": True})
    assert plugin.asked == [("save", "one.ckpt", {"fast": True})]
    again = trainer(max_epochs=3, plugins=plugin)
    again.fit(Plain(), batches(3), ckpt_path="memory://one.ckpt", weights_only=False)
    assert again.global_step == 9
    assert plugin.asked[1:] == [("load", "one.ckpt", False), "teardown"]
    assert not list(tmp_path.iterdir())


def test_the_default_one_has_no_options(tmp_path: Path) -> None:
    made = trainer(max_epochs=1)
    made.fit(Plain(), batches(1))
    with pytest.raises(MisconfigurationException, match="storage_options"):
        made.save_checkpoint(tmp_path / "a.ckpt", storage_options={"fast": True})
    with pytest.raises(MisconfigurationException, match="2 CheckpointIO"):
        trainer(plugins=[InMemory(), TorchCheckpointIO()])


class Waits(TorchCheckpointIO):
    """Writes only once it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert self.go.wait(20)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_thread_writes_what_was_there_when_it_was_asked(tmp_path: Path) -> None:
    inner = Waits()
    plugin = AsyncCheckpointIO(inner)
    weight = torch.ones(3)
    plugin.save_checkpoint({"a": {"weight": weight, "tied": weight, "n": (1, weight)}}, tmp_path / "a.ckpt")
    weight.zero_()
    assert not (tmp_path / "a.ckpt").exists()
    inner.go.set()
    plugin.teardown()
    held = plugin.load_checkpoint(tmp_path / "a.ckpt")["a"]
    assert held["weight"].tolist() == [1, 1, 1] and held["n"][0] == 1
    assert held["weight"].data_ptr() == held["tied"].data_ptr() == held["n"][1].data_ptr()


def test_a_fit_with_the_thread_leaves_the_same_files(tmp_path: Path) -> None:
    before = threading.active_count()
    for name, plugins in (("thread", [AsyncCheckpointIO()]), ("plain", [])):
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=2)
        trainer(enable_checkpointing=True, callbacks=[keep], max_epochs=3, plugins=plugins).fit(Plain(), batches(4))
    assert threading.active_count() == before
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("thread", "plain")]
    assert files[0] == files[1] == ["epoch=2-step=12.ckpt", "last.ckpt"]
    thread, plain = (torch.load(tmp_path / name / "last.ckpt")["state_dict"] for name in ("thread", "plain"))
    assert all(torch.equal(thread[key], plain[key]) for key in plain)


def test_an_error_in_the_thread_reaches_the_program(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint({"a": 1}, tmp_path / "file" / "below" / "a.ckpt")
    with pytest.raises(CheckpointError):
        plugin.teardown()
