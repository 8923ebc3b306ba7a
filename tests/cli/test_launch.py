"""`lit-fast launch`: over torchrun, and as a job of SLURM's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import new_process
import pytest

from lit_fast.cli import launch
from lit_fast.cli import main as cli
from lit_fast.errors import RankFailedError

PROGRAM = """
import os, sys
from pathlib import Path
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "PL_TRAINER_DEVICES", "PL_TRAINER_NUM_NODES")
Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join([*(os.environ[name] for name in names), *sys.argv[2:]]))
sys.exit(int(sys.argv[2]) if os.environ["RANK"] == "1" else 0)
"""
COMMAND = "import sys; from lit_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.dist
@pytest.mark.parametrize("code", [0, 6])
def test_on_this_machine(tmp_path: Path, code: int) -> None:
    """torchrun's processes, in whose environment a Trainer finds its devices; the exit code is the failing one's."""
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["launch", "--nproc-per-node", "2", str(tmp_path / "program.py"), str(tmp_path), str(code), "--lr", "1"]
    done = new_process.run(COMMAND, *words, timeout=60)
    assert done.returncode == code, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"{r} {r} 2 0 2 1 {code} --lr 1" for r in (0, 1)]
    assert ("lit-fast launch: rank 1 (pid " in done.stderr) == bool(code)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What torchrun would have been called with."""
    called: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.run", lambda options: None)
    monkeypatch.setattr(
        "torch.distributed.run.get_args_parser", lambda: types.SimpleNamespace(parse_args=called.append)
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return called


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def test_what_torchrun_is_told(words: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "p.py"
    program.touch()
    assert cli.main(["launch", "-m", "package.train", "--x", "1"]) == 0
    assert words[-1] == [*"--nnodes 1 --nproc-per-node 1 --max-restarts 0 --standalone -m package.train --x 1".split()]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    there = f"localhost:{free_port()}"
    assert cli.main(["launch", "--nodes", "3", "--rdzv-endpoint", there, "--max-restarts", "2", str(program)]) == 0
    start = f"--nnodes 3 --nproc-per-node 8 --max-restarts 2 --rdzv-backend c10d --rdzv-endpoint {there}"
    assert words[-1] == [*f"{start} --rdzv-id lit-fast --rdzv-conf join_timeout=600".split(), str(program)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--nodes", "2"], "--nodes 2 needs --rdzv-endpoint HOST:PORT"),
        (["--rdzv-endpoint", "node0"], "--rdzv-endpoint 'node0' is not HOST:PORT"),
        (["--rdzv-endpoint", "node0:http"], "is not HOST:PORT"),
        (["--rdzv-endpoint", "no.such.host.invalid:1"], "does not know the host 'no.such.host.invalid'"),
    ],
)
def test_endpoints_that_are_none(
    words: list[list[str]], capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert cli.main(["launch", *given, __file__]) == 1
    assert says in capsys.readouterr().err and not words


def test_a_port_in_use(words: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """By another program; where it is torch's rendezvous, another node of this machine is there already."""
    from torch.distributed import TCPStore

    monkeypatch.setattr(launch, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["launch", "--nodes", "2", "--rdzv-endpoint", f"localhost:{port}", __file__]) == 1
        assert f"another program listens on port {port} of this machine" in capsys.readouterr().err and not words
    monkeypatch.setattr(launch, "ANSWER_SECONDS", 20.0)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    launch.check_endpoint(f"localhost:{store.port}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["no_such.py"], "there is no file 'no_such.py'; for a module: lit-fast launch -m no_such.py"),
        (["--nodes", "0", __file__], "--nodes: '0' is no whole number from 1"),
        (["--nproc-per-node", "gpus", __file__], "--nproc-per-node: 'gpus' is no whole number"),
        (["--time", "soon", __file__], "--time: 'soon' is no time"),
    ],
)
def test_wrong_command_lines(capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", *given])
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("12:00:00", 720),
        ("00:00:30", 1),
        ("10:00", 10),
        ("2-0", 2880),
        ("1-06:30", 1830),
        ("1-0:0:1", 1441),
    ],
)
def test_times_as_slurm_writes_them(text: str, minutes: int) -> None:
    assert launch._minutes(text) == minutes


def test_machines_that_do_not_come(
    words: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

    there = f"localhost:{free_port()}"
    for error, says in (
        (RendezvousTimeoutError("late"), f"Not all of the 2 machines came to {there} within 5 seconds"),
        (RendezvousConnectionError("nobody"), f"cannot meet at --rdzv-endpoint {there}: nothing answers"),
    ):

        def run(options: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("torch.distributed.run.run", run)
        given = ["--nodes", "2", "--rdzv-endpoint", there, "--join-timeout", "5"]
        assert cli.main(["launch", *given, __file__]) == 1
        assert says in capsys.readouterr().err


# -- SLURM


class Executor:
    """Notes what submitit's would be told."""

    made: dict[str, Any]
    refuses = ""

    def __init__(self, **made: Any) -> None:
        type(self).made = made

    def update_parameters(self, **given: Any) -> None:
        type(self).made |= given

    def submit(self, task: launch.Task) -> Any:
        if self.refuses:
            raise RuntimeError(self.refuses)
        type(self).made["task"] = task
        return types.SimpleNamespace(job_id="77", paths=types.SimpleNamespace(folder="logs"), results=self.results)

    def results(self) -> None:
        raise FailedJobError("task 3 of it raised")


class FailedJobError(RuntimeError):
    pass


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> type[Executor]:
    core = types.SimpleNamespace(utils=types.SimpleNamespace(FailedJobError=FailedJobError))
    module = types.SimpleNamespace(AutoExecutor=Executor, core=core)
    monkeypatch.setitem(sys.modules, "submitit", module)  # type: ignore[arg-type]
    monkeypatch.setattr(Executor, "refuses", "")
    return Executor


def test_a_job(submitit: type[Executor], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = "--slurm --nodes 2 --gpus-per-node 4 --partition gpu --account us --time 1-0 --mem 64GB --cpus-per-task 6"
    assert cli.main(["launch", *options.split(), "--log-dir", str(tmp_path), __file__, "--lr", "1"]) == 0
    assert "job 77: 8 tasks; outputs: logs" in capsys.readouterr().out
    task = submitit.made.pop("task")
    assert task.command == [sys.executable, __file__, "--lr", "1"] and task.folder == os.getcwd()
    assert submitit.made == {
        "folder": str(tmp_path), "cluster": "slurm", "nodes": 2, "tasks_per_node": 4, "timeout_min": 1440,
        "name": "test_launch", "gpus_per_node": 4, "cpus_per_task": 6, "slurm_mem": "64GB", "slurm_partition": "gpu",
        "slurm_account": "us", "slurm_signal_delay_s": 90,
    }  # fmt: skip
    assert (os.environ["PL_TRAINER_DEVICES"], os.environ["PL_TRAINER_NUM_NODES"]) == ("4", "2")
    assert os.environ["SUBMITIT_PREEMPT_SIGNAL"] == "USR1"  # what a Trainer has its job requeued by


def test_jobs_that_fail(
    submitit: type[Executor], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["launch", "--slurm", "--wait", __file__]) == 1
    assert "job 77 failed: task 3 of it raised" in capsys.readouterr().err
    monkeypatch.setattr(submitit, "refuses", "Could not detect srun")
    assert cli.main(["launch", "--slurm", __file__]) == 1
    assert "The job was not submitted: Could not detect srun" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)  # type: ignore[arg-type]
    assert cli.main(["launch", "--slurm", __file__]) == 1
    assert "not installed: pip install 'lit-fast[slurm]'" in capsys.readouterr().err


def environment_of(cluster: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(cluster=cluster, node=0, global_rank=2, hostname="here")


def test_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs in the folder of the command; signals come to it, and its failure is the task's."""
    exported: list[bool] = []

    class Distributed:
        def export(self, set_cuda_visible_devices: bool) -> None:
            exported.append(set_cuda_visible_devices)

    module = types.SimpleNamespace(helpers=types.SimpleNamespace(TorchDistributedEnvironment=Distributed))
    monkeypatch.setitem(sys.modules, "submitit", module)  # type: ignore[arg-type]
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        module.JobEnvironment = lambda: environment_of("slurm")
        launch.Task([sys.executable, "-c", "open('ran', 'w').close()"], str(tmp_path))()
        assert (tmp_path / "ran").exists() and not exported
        module.JobEnvironment = lambda: environment_of("local")
        program = "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: exit(9)); os.kill(os.getppid(), 10)"
        with pytest.raises(RankFailedError, match=r"rank 2 \(pid \d+ on .*\) ended with exit code 9"):
            launch.Task([sys.executable, "-c", f"{program}; signal.pause()"], str(tmp_path))()
        assert exported == [False] and os.environ["NODE_RANK"] == "0"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.dist
@pytest.mark.slow
def test_submitit_itself(tmp_path: Path) -> None:
    """Two tasks on this machine, as a job of SLURM's has them."""
    pytest.importorskip("submitit", reason="pip install 'lit-fast[slurm]'")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["launch", "--slurm", "--cluster", "local", "--nproc-per-node", "2", "--wait", "--log-dir", "logs"]
    for code in (0, 5):
        done = subprocess.run(
            [sys.executable, "-m", "lit_fast.cli.main", *words, "program.py", ".", str(code)],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "GROUP_RANK": "0"},
        )  # fmt: skip
        assert done.returncode == (1 if code else 0), done.stderr
        assert [(tmp_path / rank).read_text() for rank in "01"] == [f"{r} {r} 2 0 2 1 {code}" for r in (0, 1)]
    assert "ended with exit code 5" in done.stderr
