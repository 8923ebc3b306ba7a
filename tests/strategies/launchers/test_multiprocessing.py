"""Processes made for a function: what comes back of them, and how they fail."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from new_process import NewProcess
from test_subprocess_script import assert_gone

from lit_fast.errors import MisconfigurationException, RankFailedError
from lit_fast.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from lit_fast.strategies.environments import LightningEnvironment
from lit_fast.strategies.launchers import MultiProcessingLauncher

pytestmark = pytest.mark.dist


def strategy(processes: int = 2) -> SimpleNamespace:
    return SimpleNamespace(cluster_environment=LightningEnvironment(), num_processes=processes, num_nodes=1)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


class Model(torch.nn.Linear):
    pass


def trainer_of(model: Model) -> SimpleNamespace:
    return SimpleNamespace(
        lightning_module=model, state=TrainerState(), callback_metrics={"early": torch.tensor(1.0)},
        checkpoint_callback=SimpleNamespace(best_model_path=""),
    )  # fmt: skip


def fit(trainer: Any, big: int) -> Any:
    """What a fit leaves behind, different in each process."""
    rank = int(os.environ["LOCAL_RANK"])
    with torch.no_grad():
        trainer.lightning_module.weight.fill_(rank + 1)
    trainer.state = TrainerState(TrainerStatus.FINISHED, TrainerFn.FITTING, RunningStage.TRAINING)
    trainer.callback_metrics["loss"] = torch.tensor(0.5 + rank)
    trainer.checkpoint_callback.best_model_path = f"best{rank}"
    drawn = (torch.rand(1).item(), torch.get_default_dtype(), torch.get_num_threads())
    places = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return rank, torch.full((big,), rank), drawn, places


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_what_comes_back(method: str) -> None:
    """A value of any size; state, metrics, best path and weights of the first process, which began as this one is."""
    model = Model(2, 2, bias=False)
    model.tied = model.weight
    trainer = trainer_of(model)
    launcher = MultiProcessingLauncher(strategy(), method)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    rank, big, drawn, places = launcher.launch(fit, trainer, big=1_000_000, trainer=trainer)
    assert rank == 0 and torch.equal(big, torch.zeros(1_000_000, dtype=torch.int64))
    assert drawn == (expected, torch.float64, 1)
    assert places["RANK"] == "0" and places["WORLD_SIZE"] == "2" and int(places["MASTER_PORT"]) > 0
    assert (
        torch.equal(model.weight, torch.ones(2, 2, dtype=torch.float32))
        and model.tied is model.weight
        and not model.weight.is_shared()
    )
    assert trainer.callback_metrics == {"early": torch.tensor(1.0), "loss": torch.tensor(0.5)}
    assert trainer.checkpoint_callback.best_model_path == "best0"
    assert (trainer.state.finished, trainer.state.fn) == (True, TrainerFn.FITTING)
    assert launcher.launch(os.getppid) != os.getpid() or method == "fork"  # without a trainer: once more is fine
    with pytest.raises(MisconfigurationException, match=r"has fitted already: .* Make a new Trainer"):
        launcher.launch(fit, trainer, 1, trainer=trainer)
    assert "LOCAL_RANK" not in os.environ


def fail(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise KeyError("no such thing")
        if how == "exit":
            sys.exit(4)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            "raise",
            r"(?s)rank 1 \(pid \d+ on .*\) ended with exit code 1:\n\nTraceback .* in fail\n.*KeyError: 'no such t",
        ),
        ("exit", r"rank 1 \(pid \d+ on .*\) ended with exit code 4\.$"),
        ("kill", r"rank 1 \(pid \d+ on .*\) was killed by SIGKILL"),
    ],
)
def test_one_that_fails(monkeypatch: pytest.MonkeyPatch, how: str, says: str) -> None:
    """The other, which hangs, is ended."""
    monkeypatch.setattr("lit_fast.strategies.launchers.launcher.GRACE_SECONDS", 0.3)
    launcher = MultiProcessingLauncher(strategy(), "fork")
    with pytest.raises(RankFailedError, match=says) as caught:
        launcher.launch(fail, how)
    assert (caught.value.rank, caught.value.pid) == (1, launcher.procs[1].pid)
    assert not any(process.is_alive() for process in launcher.procs)


def leave() -> None:
    sys.exit(0)


def test_one_that_leaves_without_a_word() -> None:
    with pytest.raises(RankFailedError, match=r"rank 0 .* ended with exit code 0\.$"):
        MultiProcessingLauncher(strategy(1), "fork").launch(leave)


# In a process of its own, which is sent a signal.
PARENT = """
    import signal, sys, time
    from pathlib import Path
    from types import SimpleNamespace
    import torch
    from lit_fast.strategies.environments import LightningEnvironment
    from lit_fast.strategies.launchers import MultiProcessingLauncher

    def work():
        import os
        def saved(number, frame):
            print("saved", flush=True)
            sys.exit(143)
        signal.signal(signal.SIGTERM, saved)
        print(os.getpid(), flush=True)
        time.sleep(60)

    strategy = SimpleNamespace(cluster_environment=LightningEnvironment(), num_processes=2, num_nodes=1)
    MultiProcessingLauncher(strategy, "fork").launch(work)
"""


@pytest.mark.parametrize(("number", "code", "saved"), [(signal.SIGTERM, 143, 2), (signal.SIGKILL, -9, 0)])
def test_signals_to_the_parent(number: int, code: int, saved: int) -> None:
    """SIGTERM is handed on, so that checkpoints are written; nobody outlives a parent that is killed."""
    parent = NewProcess(PARENT)
    until = time.monotonic() + 20
    while parent._outputs[0].read_text().count("\n") < 2 and time.monotonic() < until:
        time.sleep(0.02)
    children = [int(text) for text in parent._outputs[0].read_text().split()]
    os.kill(parent.pid, number)
    assert_gone(*children)
    done = parent.wait(10)
    assert done.returncode == code and done.stdout.count("saved") == saved, done.stderr


def test_what_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match=r"start_method='thread'; allowed here are .*fork"):
        MultiProcessingLauncher(strategy(), "thread")
    with pytest.raises(MisconfigurationException, match=r"cannot be copied to them .* or set strategy='ddp'"):
        MultiProcessingLauncher(strategy(), "spawn").launch(lambda: 1)
    fork = MultiProcessingLauncher(strategy(), "fork")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(MisconfigurationException, match="forks this process, and CUDA, which has been used in it"):
            fork.launch(leave)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "ps1", ">>> ", raising=False)
        assert fork.is_interactive_compatible
        with pytest.raises(MisconfigurationException, match=r"'ddp_spawn'.*'ddp_notebook'"):
            MultiProcessingLauncher(strategy(), "spawn").launch(leave)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MisconfigurationException, match=r"started as one of several \(LightningEnvironment\)"):
        fork.launch(leave)


def test_a_program_without_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(_inheriting=True))
    with pytest.raises(MisconfigurationException, match='under `if __name__ == "__main__":`'):
        MultiProcessingLauncher(strategy(), "forkserver").launch(leave)
