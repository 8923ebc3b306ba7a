"""What a checkpoint holds and which file is found; bad files are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import QUIET, Plain, batches, fitted
from torch import nn

import lit_fast
from lit_fast.errors import CheckpointError, MisconfigurationException


def saved(path: Path, model: Any = None, **options: Any) -> Path:
    made = fitted(model or Plain(), batches(4), **{"max_epochs": 1, **options})
    made.save_checkpoint(path)
    return path


class NeverTrains(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("work was done on a bad checkpoint")


def resume(path: Any, model: Any = None, **options: Any) -> lit_fast.Trainer:
    made = lit_fast.Trainer(**{**QUIET, "max_epochs": 3, **options})
    made.fit(model or NeverTrains(), batches(4), ckpt_path=path)
    return made


def test_loads_without_pickle_and_has_lightnings_keys(tmp_path: Path) -> None:
    held = torch.load(saved(tmp_path / "a.ckpt"), weights_only=True)
    assert set(held) == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
        "lr_schedulers", "lit_fast",
    }  # fmt: skip
    assert held["global_step"] == 4 and held["epoch"] == 1
    assert set(held["lit_fast"]["rng"]) >= {"python", "torch"}


def test_weights_loads_into_plain_torch(tmp_path: Path) -> None:
    model = Plain(lambda p: torch.optim.AdamW(p, lr=0.1))
    held = torch.load(saved(tmp_path / "a.ckpt", model), weights_only=True)
    other = Plain()
    other.load_state_dict(held["state_dict"])
    optimizer = torch.optim.AdamW(other.parameters())
    optimizer.load_state_dict(held["optimizer_states"][0])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(float(state["step"]) == 4 for state in optimizer.state.values())


def test_missing(tmp_path: Path) -> None:
    for load in (resume, Plain.load_from_checkpoint):
        for kind in (CheckpointError, FileNotFoundError):
            with pytest.raises(kind, match="here is no checkpoint"):
                load(tmp_path / "none.ckpt")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated(keep: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        resume(path)


def test_of_another_model(tmp_path: Path) -> None:
    class Other(NeverTrains):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))

    path = saved(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"of another model than Other: 3 shapes differ \(net.0.bias is \(16,\)"):
        resume(path, Other())

    class More(NeverTrains):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match=r"2 keys are missing in the file \(more.bias"):
        resume(path, More())


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.ckpt")
    held = torch.load(path, weights_only=True)
    torch.save({**held, "evil": Evil()}, path)
    with pytest.raises(CheckpointError, match="weights_only"):
        resume(path)
    assert not (tmp_path / "executed").exists()


def test_weights_only_file(tmp_path: Path) -> None:
    made = fitted(Plain(), batches(4), max_epochs=1)
    made.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="holds weights only"):
        resume(tmp_path / "a.ckpt")


def test_no_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="has the keys weight, and 'state_dict' is missing"):
        resume(tmp_path / "a.ckpt")


def test_other_optimizers(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"holds 0 schedulers and this run has 1"):

        class Scheduled(NeverTrains):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        resume(path, Scheduled())

    class Groups(NeverTrains):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": [p]} for p in self.parameters()], lr=0.1)

    with pytest.raises(CheckpointError, match="state of SGD does not fit"):
        resume(path, Groups())


# -- which file "last" and "best" are


def checkpointed(folder: Path, **options: Any) -> lit_fast.Trainer:
    callback = lit_fast.callbacks.ModelCheckpoint(folder, save_top_k=-1)
    given = {**QUIET, "enable_checkpointing": True, "callbacks": callback, **options}
    ckpt_path = given.pop("ckpt_path", None)
    made = lit_fast.Trainer(**given)
    made.fit(Plain(), batches(4), ckpt_path=ckpt_path)
    return made


def test_last_is_the_newest_and_not_the_longest(tmp_path: Path) -> None:
    checkpointed(tmp_path, max_epochs=5)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    checkpointed(tmp_path, max_epochs=2)
    made = checkpointed(tmp_path, max_epochs=3, ckpt_path="last")
    assert Path(made.ckpt_path or "").name == "epoch=1-step=8-v1.ckpt"


def test_last_passes_over_what_cannot_be_resumed(tmp_path: Path) -> None:
    made = checkpointed(tmp_path, max_epochs=1)
    made.save_checkpoint(tmp_path / "export.ckpt", weights_only=True)
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="passes over .*broken.ckpt"):
        made = checkpointed(tmp_path, max_epochs=2, ckpt_path="last")
    assert Path(made.ckpt_path or "").name == "epoch=0-step=4.ckpt"


def test_last_without_any_starts_anew(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no checkpoint was found, the run starts anew"):
        made = checkpointed(tmp_path, max_epochs=1, ckpt_path="last")
    assert made.global_step == 4


def test_best(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="no checkpoint was saved so far"):
        checkpointed(tmp_path, max_epochs=1, ckpt_path="best")


def test_hpc_is_the_file_with_the_highest_number(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"there is no hpc_ckpt_<number>\.ckpt"):
        checkpointed(tmp_path, max_epochs=1, ckpt_path="hpc", default_root_dir=tmp_path)
    made = checkpointed(tmp_path, max_epochs=1)
    for number in (2, 10):
        made.save_checkpoint(tmp_path / f"hpc_ckpt_{number}.ckpt")
    again = checkpointed(tmp_path, max_epochs=2, ckpt_path="hpc", default_root_dir=tmp_path)
    assert Path(again.ckpt_path or "").name == "hpc_ckpt_10.ckpt" and again.global_step == 8


def test_a_second_trainer_of_one_program_is_no_continuation(tmp_path: Path) -> None:
    """Folds of a cross-validation, each with ckpt_path="last" and a version of its own below one logger."""
    made = []
    for _ in range(2):
        logger = lit_fast.loggers.CSVLogger(tmp_path)
        made.append(lit_fast.Trainer(**{**QUIET, "logger": logger, "enable_checkpointing": True, "max_epochs": 1}))
        with pytest.warns(UserWarning, match="the run starts anew"):
            made[-1].fit(Plain(), batches(4), ckpt_path="last")
    assert [trainer.global_step for trainer in made] == [4, 4]


def test_state_of_callbacks_that_are_gone_is_named(tmp_path: Path) -> None:
    path = checkpointed(tmp_path, max_epochs=1).checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="callbacks that are not in this Trainer: ModelCheckpoint"):
        resume(Path(path), Plain(), max_epochs=2)


def test_a_lower_max_epochs_is_refused(tmp_path: Path) -> None:
    path = checkpointed(tmp_path, max_epochs=3).checkpoint_callback.best_model_path
    with pytest.raises(MisconfigurationException, match="max_epochs=1"):
        resume(Path(path), Plain(), max_epochs=1)


def test_a_resumed_run_keeps_what_callbacks_saw(tmp_path: Path) -> None:
    """A metric of an earlier epoch is there for a callback that watches it, though nobody logged it since."""

    class Model(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 2.5)

        def on_train_start(self) -> None:
            self.known = dict(self.trainer.callback_metrics)

    first = lit_fast.Trainer(**{**QUIET, "max_epochs": 1})
    first.fit(Model(), batches(4), [batches(1)])
    first.save_checkpoint(tmp_path / "a.ckpt")
    model = Model()
    resume(tmp_path / "a.ckpt", model, max_epochs=2)
    assert model.known["val"] == 2.5
