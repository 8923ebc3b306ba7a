"""Real processes that die, raise, hang or are cut off: the others name them and end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from new_process import NewProcess
from ranks import free_port

import lit_fast
from lit_fast.callbacks import ModelCheckpoint
from lit_fast.demos.boring_classes import BoringModel, RandomDataset

pytestmark = pytest.mark.dist
PROGRAM = Path(__file__).parents[1] / "ring_program.py"
FIT = PROGRAM.with_name("failing_fit_program.py")
MUST_END = 30.0  # seconds after a failure, as promised


class Job:
    """Processes of one job, and how they ended."""

    def __init__(self, processes: list[NewProcess]) -> None:
        self.processes = processes

    def wait_until_running(self, victim: int) -> float:
        """When the victim is where it fails."""
        output = self.processes[victim]._outputs[0]
        end = time.monotonic() + 60.0
        while "running" not in output.read_text():
            assert time.monotonic() < end and self.processes[victim].poll() is None, self.said(victim)
            time.sleep(0.01)
        return time.monotonic()

    def said(self, rank: int) -> str:
        return self.processes[rank]._outputs[1].read_text()

    def ended(self, rank: int, since: float) -> float:
        """Seconds until this rank has ended with an exit code that is not 0."""
        process = self.processes[rank]
        while process.poll() is None:
            assert time.monotonic() < since + MUST_END, f"rank {rank} still runs:\n{self.said(rank)}"
            time.sleep(0.01)
        seconds = time.monotonic() - since
        assert process.poll() == 1, (process.poll(), self.said(rank))
        return seconds

    def named(self, rank: int) -> str:
        """What the one line of a surviving rank says of the one that failed."""
        lines = re.findall(r"^lit_fast: rank \d+ \(pid \d+\) ends: (.*)$", self.said(rank), re.MULTILINE)
        assert len(lines) == 1, self.said(rank)
        return str(lines[0])


@contextmanager
def job(world_size: int, victim: int, how: str, *more: object, program: Path = PROGRAM) -> Iterator[Job]:
    place = {
        "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        NewProcess(program, victim, how, *more, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    try:
        yield Job(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process._process.join()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named(victim: int) -> None:
    with job(2, victim, "kill", 20) as ranks:
        failed = ranks.wait_until_running(victim)
        other = 1 - victim
        seconds = ranks.ended(other, failed)
        pid = ranks.processes[victim].pid
        assert re.match(
            rf"rank {victim} \(host .*, pid {pid}\) (has ended without a word|was killed by SIGKILL)",
            ranks.named(other),
        )
        assert "RankFailedError: rank" in ranks.said(other)
        print(f"killed rank {victim}: {seconds:.1f} s")
        assert seconds < 10.0


@pytest.mark.parametrize(
    ("victim", "how", "reason"),
    [
        (0, "raise", "failed while training: ValueError: one rank only"),
        (1, "exit", "ended while training while the others went on"),
    ],
)
def test_a_rank_that_raises_is_named_with_its_error(victim: int, how: str, reason: str) -> None:
    with job(2, victim, how, 20) as ranks:
        failed = ranks.wait_until_running(victim)
        seconds = ranks.ended(1 - victim, failed)
        assert reason in ranks.named(1 - victim)
        print(f"{how} in rank {victim}: {seconds:.1f} s")
        assert seconds < 10.0


@pytest.mark.parametrize("victim", [1])
def test_a_rank_that_ends_without_a_word_is_named(victim: int) -> None:
    with job(2, victim, "end", 20) as ranks:
        failed = ranks.wait_until_running(victim)
        seconds = ranks.ended(1 - victim, failed)
        assert f"rank {victim} (host " in ranks.named(1 - victim)
        print(f"os._exit in rank {victim}: {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_named_within_thirty_seconds(victim: int) -> None:
    with job(2, victim, "stop", 20) as ranks:
        failed = ranks.wait_until_running(victim)
        seconds = ranks.ended(1 - victim, failed)
        assert "a signal (SIGSTOP) or a debugger holds its process" in ranks.named(1 - victim)
        print(f"stopped rank {victim}: {seconds:.1f} s")


def test_a_stopped_rank_with_a_shorter_limit() -> None:
    with job(3, 1, "stop", 3) as ranks:
        failed = ranks.wait_until_running(1)
        print([ranks.ended(rank, failed) for rank in (0, 2)])
        for rank in (0, 2):
            assert "rank 1 (host" in ranks.named(rank) and "SIGSTOP" in ranks.named(rank)


# -- a Trainer


def usable(folder: Path) -> None:
    """The last checkpoint before the failure is whole, and a fit in one process goes on from it."""
    last = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert last.name == "step=20.ckpt"
    trainer = lit_fast.Trainer(
        accelerator="cpu", devices=1, max_steps=22, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}"),
    )  # fmt: skip
    trainer.fit(BoringModel(), torch.utils.data.DataLoader(RandomDataset(32, 10**6), batch_size=2), ckpt_path=last)
    assert trainer.global_step == 22


@pytest.mark.parametrize(
    ("how", "victim", "reason"),
    [
        pytest.param("kill", 1, "has ended without a word|was killed by SIGKILL", marks=pytest.mark.slow),
        ("kill", 0, "has ended without a word|was killed by SIGKILL"),
        ("raise", 1, "failed in trainer.fit: ValueError: one rank only"),
        pytest.param("stop", 0, r"a signal \(SIGSTOP\) or a debugger holds its process", marks=pytest.mark.slow),
        pytest.param("stop", 1, r"a signal \(SIGSTOP\) or a debugger holds its process", marks=pytest.mark.slow),
    ],
)
def test_a_fit_whose_rank_fails_is_ended_and_can_go_on(how: str, victim: int, reason: str, tmp_path: Path) -> None:
    with job(2, victim, how, tmp_path, 1, program=FIT) as ranks:
        failed = ranks.wait_until_running(victim)
        other = 1 - victim
        seconds = ranks.ended(other, failed)
        assert re.match(
            rf"rank {victim} \(host .*, pid {ranks.processes[victim].pid}\) .*({reason})", ranks.named(other)
        )
        assert "on_exception: RankFailedError" in ranks.processes[other]._outputs[0].read_text()
        print(f"{how} in rank {victim} of a fit: {seconds:.1f} s")
    usable(tmp_path)


# -- two machines


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between; what to put before a command to run it on each.

    Each has its own host name and table of processes, too, so that a process sees those of the other as little as on
    another machine. The first is 10.77.0.1.
    """
    names = [f"lit-fast-{os.getpid()}-{letter}" for letter in "ab"]
    ends = [f"lf{os.getpid() % 10**8}{letter}" for letter in "ab"]  # at most 15 letters
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        commands += [
            ["ip", "link", "set", end, "netns", name],
            ["ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end],
            ["ip", "-n", name, "link", "set", end, "up"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for command in commands:
            try:
                done = subprocess.run(command, check=False, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("no `ip` command (iproute2) to make network namespaces with")
            if done.returncode:
                pytest.skip(f"no network namespaces here: {' '.join(command)}: {done.stderr.strip()}")
        isolate = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        yield [
            ["ip", "netns", "exec", name, *isolate, "sh", "-c", f'hostname host-{letter} && exec "$@"', "sh"]
            for name, letter in zip(names, "ab", strict=True)
        ]
    finally:
        for name in names:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def unplug(second: list[str]) -> None:
    name = second[3]
    (cable,) = re.findall(
        r"(lf\d+b)@", subprocess.run(["ip", "-n", name, "link"], check=False, capture_output=True, text=True).stdout
    )
    subprocess.run(["ip", "-n", name, "link", "set", cable, "down"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", "torchrun"])
@pytest.mark.parametrize("program", [PROGRAM, FIT], ids=["ring", "fit"])
def test_a_host_that_is_unplugged_is_named(program: Path, launcher: str, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    arguments = [str(program), "-1", "unplugged", *(["20"] if program is PROGRAM else [str(checkpoints), "2"])]
    with two_hosts() as hosts, ExitStack() as stack:
        outputs, processes = [], []
        for rank, host in enumerate(hosts):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            if launcher == "plain":
                env |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
                env |= {"LOCAL_RANK": "0", "NODE_RANK": str(rank)}
                command = [*host, sys.executable, *arguments]
            else:
                run = ["--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=10.77.0.1"]
                command = [*host, sys.executable, "-m", "torch.distributed.run", *run, *arguments]
            path = tmp_path / str(rank)
            outputs.append(path)
            file = stack.enter_context(path.open("w"))
            process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        end = time.monotonic() + 60
        while not all("running" in path.read_text() for path in outputs):
            assert time.monotonic() < end, [path.read_text() for path in outputs]
            time.sleep(0.05)
        unplug(hosts[1])
        since, seconds = time.monotonic(), [0.0, 0.0]
        while 0.0 in seconds:
            for rank, process in enumerate(processes):
                if seconds[rank] == 0.0 and process.poll() is not None:
                    seconds[rank] = time.monotonic() - since
            assert time.monotonic() < since + MUST_END, [path.read_text() for path in outputs]
            time.sleep(0.05)
        print(f"unplugged ({program.stem}, {launcher}): {seconds}")
        assert all(process.returncode for process in processes)
        first, second = (path.read_text() for path in outputs)
        assert re.search(r"^lit_fast: rank 0 .* ends: rank 1 \(host host-b, pid \d+\) gave no sign of", first, re.M)
        assert re.search(r"^lit_fast: rank 1 .* ends: rank 0 \(host host-a, pid \d+\) the store at", second, re.M)
    if program is FIT:
        saved = [int(path.stem.partition("=")[2]) for path in checkpoints.glob("*.ckpt")]
        state = torch.load(checkpoints / f"step={max(saved)}.ckpt", weights_only=True)
        assert state["global_step"] == max(saved) >= 20
