"""Sharded checkpoints: whole or not there; each strategy's checkpoint loaded by every other, at other world sizes."""

from __future__ import annotations

import copy
import os
import pathlib
import pickle
import shutil
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lit_fast
from lit_fast.checkpoint import io, sharded
from lit_fast.checkpoint.slices import by_name
from lit_fast.cli.main import main
from lit_fast.errors import CheckpointError
from lit_fast.strategies import FSDP2Strategy, ModelParallelStrategy

dist_test = pytest.mark.dist
KINDS = ("single", "ddp", "zero1", "fsdp2", "fsdp2-file", "model_parallel")


class Model(lit_fast.LightningModule):
    """Rows that do not divide among three or four processes; two param groups, out of the order of registration."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not isinstance(self.first.weight, DTensor):
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            mesh = self.device_mesh
            if mesh["tensor_parallel"].size() > 1:
                parallelize_module(
                    self, mesh["tensor_parallel"], {"first": ColwiseParallel(), "second": RowwiseParallel()}
                )
            fully_shard(self, mesh=mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        loss = nn.functional.mse_loss(self.second(torch.tanh(self.first(batch[0]))), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.second.parameters()}, {"params": self.first.parameters(), "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches() -> list[Any]:
    """The same in every process, so that the mean over processes is what each has."""
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(4, 5, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(6)]


def strategy_of(kind: str) -> Any:
    made = {
        "single": lambda: "auto",
        "fsdp2": lambda: FSDP2Strategy(auto_wrap_policy={nn.Linear}),
        "fsdp2-file": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
        "model_parallel": lambda: ModelParallelStrategy(data_parallel_size=1),
    }
    return made.get(kind, lambda: kind)()


def trainer_of(kind: str, steps: int, **options: Any) -> lit_fast.Trainer:
    world = 1 if kind == "single" else int(os.environ["WORLD_SIZE"])
    options = {"enable_checkpointing": False, "logger": False, **options}
    return lit_fast.Trainer(
        accelerator="cpu", devices=world, strategy=strategy_of(kind), max_steps=steps, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip


def held_by(trainer: Any, model: Any) -> dict[str, Any]:
    """Weights, and the optimizer's state by names, whole."""
    from lit_fast.checkpoint.slices import whole_of

    names = {p: name for name, p in model.named_parameters()}
    optimizer = trainer.optimizers[0]
    if hasattr(trainer.strategy, "save_distributed_checkpoint"):
        named = by_name(optimizer, names)
    else:
        state = trainer.strategy.optimizer_state(optimizer)
        order = ["second.weight", "second.bias", "first.weight", "first.bias"]
        named = {"state": {order[number]: slots for number, slots in state["state"].items()}}
    return copy.deepcopy({"weights": whole_of(dict(model.state_dict())), "state": whole_of(named["state"])})


def write(kind: str, path: str) -> Any:
    trainer, model = trainer_of(kind, 3), Model()
    trainer.fit(model, batches())
    trainer.save_checkpoint(path)
    return held_by(trainer, model)


class Looks(lit_fast.Callback):
    """What is held once a checkpoint was restored, before a step."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.found = held_by(trainer, module)


def read(kind: str, path: str) -> Any:
    looks, model = Looks(), Model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    trainer = trainer_of(kind, 4, callbacks=[looks])
    trainer.fit(model, batches(), ckpt_path=path)
    return looks.found, model.losses, int(model.seen), trainer.optimizers[0].param_groups[0]["lr"]


def read_all(kinds: list[str], path: str) -> Any:
    return {kind: read(kind, path) for kind in kinds}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    weights = all(torch.equal(a["weights"][name], b["weights"][name]) for name in b["weights"])
    assert a["state"].keys() == b["state"].keys() and a["weights"].keys() == b["weights"].keys()
    return weights and all(
        torch.equal(a["state"][name][key], value) for name, slots in b["state"].items() for key, value in slots.items()
    )


def next_loss(held: dict[str, Any]) -> float:
    """What the step after the restored ones must find: by a plain module with these weights."""
    model = Model()
    model.load_state_dict(held["weights"])
    x, y = batches()[3]
    return nn.functional.mse_loss(model.second(torch.tanh(model.first(x))), y).item()


def exchange(writer: str, size: int, readers: dict[int, list[str]], path: pathlib.Path) -> None:
    file = str(path / f"{writer}.ckpt")
    held = run_ranks(write, size, writer, file, timeout=60.0)[0]
    for world, kinds in readers.items():
        for rank, found in enumerate(run_ranks(read_all, world, kinds, file, timeout=120.0)):
            for kind, (restored, losses, seen, lr) in found.items():
                if kind == "zero1" and rank > 0:  # which gathers its state in the first process
                    restored["state"] = held["state"]
                assert same(restored, held), (writer, size, kind, world)
                assert losses == [pytest.approx(next_loss(held), rel=1e-6)], (writer, size, kind, world)
                assert (seen, lr) == (4, pytest.approx(0.0005)), (writer, size, kind, world)


@dist_test
def test_a_directory_of_two_processes_is_read_by_every_strategy(tmp_path: pathlib.Path) -> None:
    exchange("fsdp2", 2, {1: ["single"], 2: ["ddp", "fsdp2-file", "model_parallel"]}, tmp_path)


@dist_test
def test_a_file_is_read_by_strategies_that_split(tmp_path: pathlib.Path) -> None:
    exchange("ddp", 2, {2: ["fsdp2", "model_parallel"]}, tmp_path)


@dist_test
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("writer", KINDS)
def test_every_strategy_reads_every_other_at_every_size(writer: str, size: int, tmp_path: pathlib.Path) -> None:
    if writer == "single" and size > 1:
        pytest.skip("one process")
    every = [kind for kind in KINDS if kind != "single"]
    exchange(writer, size, {1: list(KINDS), 2: every, 3: every, 4: every}, tmp_path)


# -- a directory that is whole or not there; in one process


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Written by this process alone, without DTensors."""
    path = str(tmp_path_factory.mktemp("sharded") / "a.ckpt")
    write_whole(path, 1.0)
    return path


def write_whole(path: str, value: float) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names = {p: name for name, p in model.named_parameters()}
    checkpoint = {
        "state_dict": model.state_dict(), "optimizer_states": [by_name(optimizer, names)], "lr_schedulers": [],
        "global_step": 7, "epoch": 1,
    }  # fmt: skip
    sharded.save(checkpoint, path, lambda value: value, 0, several=False)


def test_it_has_lightnings_layout_and_loads_as_a_file_would(directory: str) -> None:
    index = sharded._index(directory)
    assert {place[0] for place in index.planner_data.values()} == {"state_dict", "optimizer_0"}
    assert ("optimizer_0", "state", "weight", "exp_avg") in index.planner_data.values()
    held = io.load(directory)
    assert held["global_step"] == 7 and held["state_dict"].keys() == {"weight", "bias"}
    state = held["optimizer_states"][0]
    assert state["param_groups"][0]["params"] == [0, 1] and state["state"][0]["step"] == 1.0
    model = nn.Linear(3, 2)
    torch.optim.AdamW(model.parameters()).load_state_dict(state)


def test_a_new_one_takes_the_place_of_the_old(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "a.ckpt")
    io.save({"state_dict": {}}, path)  # a file of that name
    for value in (1.0, 2.0):
        write_whole(path, value)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert io.load(path)["state_dict"]["weight"].mean() == pytest.approx(2.0, rel=1e-2)


def test_one_that_cannot_be_written_leaves_the_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.ckpt")
    write_whole(path, 1.0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save", full)
    with pytest.raises(CheckpointError, match=r"could not be written \(process 0: OSError.*No space left"):
        write_whole(path, 2.0)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert io.load(path)["state_dict"]["weight"].mean() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_damage_is_told(directory: str, tmp_path: pathlib.Path, name: str, harm: str) -> None:
    path = tmp_path / "b.ckpt"
    shutil.copytree(directory, path)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data if harm == "flip" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"not whole|is a directory, and not a sharded checkpoint"):
        io.load(path)


def test_pickled_code_in_the_index_is_not_run(directory: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "b.ckpt"
    shutil.copytree(directory, path)
    (path / "commit.json").unlink()  # as in Lightning's
    (path / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"\.metadata: it holds pickled code: builtins\.print"):
        io.load(path)


def test_consolidate(directory: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "whole.ckpt")
    assert main(["consolidate", directory, "--output-file", file]) == 0
    assert "wrote" in capsys.readouterr().out
    held, expected = io.load(file), io.load(directory)
    assert os.path.isfile(file) and held.keys() == expected.keys()
    assert torch.equal(held["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert main(["consolidate", directory, "--output-file", file]) == 1
    assert main(["consolidate", str(tmp_path)]) == 1


def keep(path: str) -> Any:
    """ModelCheckpoint with directories: one is kept, "last" is a link; a second fit goes on from it."""
    from lit_fast.callbacks import ModelCheckpoint

    found: dict[str, Any] = {}
    for steps in (2, 4):
        callback = ModelCheckpoint(path, save_top_k=1, every_n_train_steps=1, save_last="link")
        trainer, model = trainer_of("fsdp2", steps, callbacks=[callback], enable_checkpointing=True), Model()
        trainer.fit(model, batches(), ckpt_path="last" if steps == 4 else None)
        found[steps] = (len(model.losses), sorted(os.listdir(path)), os.path.realpath(os.path.join(path, "last.ckpt")))
    return found


@dist_test
def test_model_checkpoint_keeps_links_and_removes_directories(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "kept")
    for found in run_ranks(keep, 2, path, timeout=90.0):
        assert found[2] == (2, ["epoch=0-step=2.ckpt", "last.ckpt"], os.path.join(path, "epoch=0-step=2.ckpt"))
        losses, names, last = found[4]
        assert losses == 2 and last == os.path.join(path, "epoch=0-step=4.ckpt")
        assert "epoch=0-step=4.ckpt" in names and "epoch=0-step=3.ckpt" not in names
