"""Trainers of two processes, started in each of the ways: a script, torchrun, new and forked processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import new_process
import pytest

pytestmark = pytest.mark.dist

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
import lit_fast
from lit_fast.demos.boring_classes import BoringModel, RandomDataset

folder, strategy, *end = sys.argv[1:]

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        if end and self.global_rank == 1 and batch_idx == 2:
            if end == ["raise"]:
                raise ValueError("the second is broken")
            os.kill(os.getpid(), signal.SIGKILL)
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

def trainer(**options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return lit_fast.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=4, default_root_dir=folder, **quiet, **options
    )

if __name__ == "__main__":
    lit_fast.seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    model, data = Model(), torch.utils.data.DataLoader(RandomDataset(32, 64), batch_size=4)
    first = trainer()
    first.fit(model, data, data)
    found = {"place": [first.global_rank, first.local_rank, first.world_size], "status": first.state.status.value}
    found["weights"] = model.layer.weight.detach().double().sum().item().hex()
    found["loss"] = first.callback_metrics["loss"].item()
    found["best"] = first.checkpoint_callback.best_model_path
    found["valid"] = trainer().validate(model, data, verbose=False)
    found["parent"] = "RANK" not in os.environ
    Path(folder, f"found{first.global_rank}.json").write_text(json.dumps(found))
"""


def python(program: Path, *arguments: object, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *through, str(program), *map(str, arguments)],
        capture_output=True, text=True, timeout=150, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def found(folder: Path, rank: int) -> dict[str, object]:
    held: dict[str, object] = json.loads((folder / f"found{rank}.json").read_text())
    return held


def check_fit(folder: Path, ranks: int, parent: bool) -> None:
    first = found(folder, 0)
    for rank in range(ranks):
        here = found(folder, rank)
        assert here["place"] == [rank, rank, 2] and here["status"] == "finished" and here["parent"] == parent
        assert {**here, "place": 0} == {**first, "place": 0}, "weights, or logged values, differ between the ranks"
    assert Path(str(first["best"])).is_file() and len(list(folder.rglob("*.ckpt"))) == 1


def test_a_script(program: Path, tmp_path: Path) -> None:
    done = python(program, tmp_path, "ddp")
    assert done.returncode == 0 and "lit_fast:" not in done.stderr, done.stderr
    check_fit(tmp_path, 2, parent=False)


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_notebook", marks=pytest.mark.slow)])
def test_forked(program: Path, tmp_path: Path, strategy: str) -> None:
    done = new_process.run(program, tmp_path, strategy, timeout=60)
    assert done.returncode == 0, done.stderr
    check_fit(tmp_path, 1, parent=True)


@pytest.mark.parametrize(("end", "says"), [("raise", "ValueError: the second is broken"), ("kill", "by SIGKILL")])
def test_a_forked_rank_that_fails(program: Path, tmp_path: Path, end: str, says: str) -> None:
    done = new_process.run(program, tmp_path, "ddp_fork", end, timeout=60)
    assert done.returncode == 1
    assert "RankFailedError: rank 1 (pid " in done.stderr and says in done.stderr
    assert not list(tmp_path.glob("found*"))


@pytest.mark.slow
def test_torchrun(program: Path, tmp_path: Path) -> None:
    done = python(program, tmp_path, "ddp", through=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    assert done.returncode == 0, done.stderr
    check_fit(tmp_path, 2, parent=False)


@pytest.mark.slow
def test_new_interpreters(program: Path, tmp_path: Path) -> None:
    done = python(program, tmp_path, "ddp_spawn")
    assert done.returncode == 0, done.stderr
    check_fit(tmp_path, 1, parent=True)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "says"), [("raise", 1, "ValueError: the second"), ("kill", 137, "SIGKILL")])
def test_a_script_that_fails(program: Path, tmp_path: Path, end: str, code: int, says: str) -> None:
    done = python(program, tmp_path, "ddp", end)
    assert done.returncode == code
    assert "RankFailedError: rank 1 (host " in done.stderr and says in done.stderr
    assert "the whole run ends" not in done.stderr  # said once
    assert not list(tmp_path.glob("found*"))
