"""Processes come together, or all say why not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from new_process import SERVER
from torch import nn

from lit_fast.errors import ProcessGroupError
from lit_fast.strategies.members import Member, ending, listener, ranks
from lit_fast.strategies.process_group import disagreement, disband, interface_towards, join
from lit_fast.strategies.same_model import check_one_device, check_same_model, difference

dist_test = pytest.mark.dist
SECONDS = 30.0  # of a process that hangs


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def in_processes(*functions: Callable[[], Any]) -> list[Any]:
    """What each function returns, or the text of its ProcessGroupError, all at once in processes of their own."""

    def follow(function: Callable[[], Any]) -> Any:
        ours, theirs = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=_say, args=(function, theirs))
        process.start()
        theirs.close()
        try:
            assert ours.poll(SECONDS), f"still running after {SECONDS} s"
            return ours.recv()
        finally:
            process.kill()
            process.join()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(follow, functions))


def _say(function: Callable[[], Any], answer: Connection) -> None:
    try:
        said = function()
    except ProcessGroupError as error:
        said = str(error)
    answer.send(said)
    os._exit(0)


def summed(**told: Any) -> tuple[float, list[int]]:
    """Join, add the ranks up, and leave."""
    told = {"main_address": "127.0.0.1", "arrival_seconds": 10.0} | told
    joined = join(**told)
    total = torch.tensor(float(joined.rank))
    dist.all_reduce(total)
    joined.leave()
    disband()
    return total.item(), [member.rank for member in joined.members]


@dist_test
def test_three_processes_come_together() -> None:
    port = free_port()
    said = in_processes(*(partial(summed, rank=rank, world_size=3, main_port=port) for rank in (2, 0, 1)))
    assert said == [(3.0, [0, 1, 2])] * 3


def twice(rank: int, port: int) -> list[int]:
    """Two runs after another in the same processes, the second with the group that is there."""
    pids = []
    for _ in range(2):
        joined = join(rank=rank, world_size=2, main_address="127.0.0.1", main_port=port, arrival_seconds=10.0)
        dist.barrier()
        joined.leave()
        pids.append(joined.members[1].pid)
    return pids


@dist_test
def test_joining_again_keeps_the_group() -> None:
    first, second = in_processes(*(partial(twice, rank, free) for free in [free_port()] for rank in range(2)))
    assert first == second and first[0] == first[1]


def with_agent_store(rank: int, port: int) -> Any:
    with mock.patch.dict(os.environ, {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}):
        return summed(rank=rank, world_size=2, main_port=port)


@dist_test
def test_torchruns_store_is_used_where_it_is_there() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))
    assert in_processes(*(partial(with_agent_store, rank, agent.port) for rank in range(2))) == [(1.0, [0, 1])] * 2
    assert agent.get("lit_fast/1/1/verdict") == b"together"


def with_own_group(rank: int, port: int, world_size: int = 2) -> Any:
    """The program has made the process group before the Trainer starts."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    return summed(rank=rank, world_size=world_size, main_port=1)


@dist_test
def test_a_group_that_the_program_made_is_used() -> None:
    port = free_port()
    assert in_processes(*(partial(with_own_group, rank, port) for rank in range(2))) == [(1.0, [0, 1])] * 2


# -- what keeps them from it


@dist_test
def test_a_rank_that_does_not_come_is_named_on_all_others() -> None:
    port = free_port()
    said = in_processes(
        *(partial(summed, rank=rank, world_size=4, main_port=port, arrival_seconds=2.0) for rank in (0, 2))
    )
    assert said[0] == said[1]
    assert "Of 4 processes 2 did not come within 2 s: ranks 1, 3. There are rank 0 (host " in said[0]


@dist_test
def test_ranks_that_were_told_different_world_sizes() -> None:
    port = free_port()
    said = in_processes(*(partial(summed, rank=rank, world_size=2 + rank, main_port=port) for rank in (0, 1)))
    assert said[0] == said[1]
    assert said[0].startswith("The processes were told different world sizes: 2 (rank 0 (host ")
    assert "3 (rank 1 (host " in said[0] and "WORLD_SIZE" in said[0]


@dist_test
def test_a_rank_beyond_the_world_is_named_on_all() -> None:
    port = free_port()
    said = in_processes(*(partial(summed, rank=rank, world_size=2, main_port=port) for rank in (0, 2)))
    assert said[0] == said[1]
    assert said[0].startswith("Rank 2 (host ") and "does not fit in a world of 2: ranks go from 0 to 1" in said[0]


@dist_test
def test_two_processes_of_one_rank() -> None:
    port = free_port()
    said = in_processes(*(partial(summed, rank=rank, world_size=3, main_port=port) for rank in (0, 1, 1)))
    assert said[0] == said[1] == said[2]
    assert said[0].startswith("Rank 1 came 2 times: host ")


@dist_test
def test_a_process_too_many_is_refused_and_the_job_runs() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))
    jobs = [partial(with_agent_store, rank, agent.port) for rank in range(2)]
    assert in_processes(*jobs) == [(1.0, [0, 1])] * 2
    (said,) = in_processes(partial(with_agent_store, 1, agent.port))
    assert said.startswith("Rank 1 came 2 times") and "The job runs without rank 1 (host " in said


def other_backend(rank: int, port: int) -> Any:
    """Rank 1 was told another backend; what init_process_group would make of it must not matter."""
    return summed(rank=rank, world_size=2, main_port=port, backend="gloo" if rank == 0 else "nccl")


@dist_test
def test_ranks_with_different_backends() -> None:
    port = free_port()
    said = in_processes(*(partial(other_backend, rank, port) for rank in range(2)))
    assert said[0] == said[1]
    assert "The ranks have different backends: cpu:gloo,cuda:nccl (rank 1 (host " in said[0]


@contextmanager
def occupied() -> Iterator[int]:
    """A port that this process listens on, and answers nothing."""
    with socket.create_server(("", 0)) as listening:
        yield int(listening.getsockname()[1])


def test_a_port_in_use_is_named_with_who_uses_it() -> None:
    with occupied() as port, pytest.raises(ProcessGroupError) as caught:
        join(rank=0, world_size=2, main_address="127.0.0.1", main_port=port, arrival_seconds=5.0)
    assert f"Port {port} is in use" in str(caught.value)
    assert f"by pid {os.getpid()} (" in str(caught.value) and "MASTER_PORT" in str(caught.value)


def test_a_listener_that_is_no_store() -> None:
    with occupied() as port, pytest.raises(ProcessGroupError, match="does not answer as the store of this job"):
        join(rank=1, world_size=2, main_address="127.0.0.1", main_port=port, arrival_seconds=1.0)


def test_nobody_listens() -> None:
    port = free_port()
    with pytest.raises(ProcessGroupError, match=rf"Nothing answers at 127.0.0.1:{port} \(.*Connection refused"):
        join(rank=1, world_size=2, main_address="127.0.0.1", main_port=port, arrival_seconds=0.5)


def test_an_address_that_is_no_host() -> None:
    with pytest.raises(ProcessGroupError, match=r"'nowhere\.invalid' is no host that this machine"):
        join(rank=1, world_size=2, main_address="nowhere.invalid", main_port=1234, arrival_seconds=0.5)


def test_a_port_that_is_none() -> None:
    with pytest.raises(ProcessGroupError, match="The main port is 70000"):
        join(rank=0, world_size=2, main_address="127.0.0.1", main_port=70000)


@dist_test
def test_a_group_of_other_numbers() -> None:
    port = free_port()
    said = in_processes(*(partial(with_own_group, rank, port, 3) for rank in range(2)))
    assert "this process is rank 1 of 2; the Trainer's devices= and num_nodes= make it rank 1 of 3" in said[1]


def test_versions_are_compared() -> None:
    def member(rank: int, torch_version: str) -> Member:
        return Member(rank, 3, "a", rank, "", "", {"torch": torch_version, "backend": "gloo"})

    assert disagreement([member(0, "2.13.0"), member(1, "2.13.0")]) is None
    said = disagreement([member(0, "2.13.0"), member(1, "2.12.1"), member(2, "2.13.0")])
    assert said is not None and said.startswith(
        "The ranks have different versions of torch: 2.12.1 (rank 1 (host a, pid 1)), 2.13.0 (ranks 0, 2)."
    )


# -- models


CHANGES = {
    "none": None,
    "shape": "parameter 0.weight: shape (3, 2), torch.float32, requires_grad=True; rank 1 has parameter 0.weight: sha",
    "frozen": "rank 0 has parameter 0.bias: shape (3,), torch.float32, requires_grad=True; rank 1 has parameter 0.bias",
    "more": "First at entry 4: rank 0 has buffer 1.running_mean: shape (3,), torch.float32; rank 1 has parameter 2.w",
}


def compare(rank: int, port: int) -> list[str | None]:
    """What each rank says of models in which rank 1 changed something."""
    joined = join(rank=rank, world_size=2, main_address="127.0.0.1", main_port=port, timeout=timedelta(seconds=20))
    said: list[str | None] = []
    for change in CHANGES:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        if rank == 1 and change == "shape":
            model[0] = nn.Linear(2, 4)
        if rank == 1 and change == "frozen":
            model[0].bias.requires_grad_(False)
        if rank == 1 and change == "more":
            model.append(nn.Linear(1, 1))
        try:
            check_same_model(model)
            said.append(None)
        except ProcessGroupError as error:
            said.append(str(error))
    joined.leave()
    disband()
    return said


@dist_test
def test_models_that_differ_between_ranks() -> None:
    port = free_port()
    first, second = in_processes(*(partial(compare, rank, port) for rank in range(2)))
    assert first == second
    for said, expected in zip(first, CHANGES.values(), strict=True):
        assert said is None if expected is None else expected in said


def test_the_first_difference_is_where_one_ends() -> None:
    assert "entry 1: rank 0 has b; rank 3 has none" in difference(["a", "b"], ["a"], 3)


def test_parameters_on_several_devices_are_named() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    with pytest.raises(ProcessGroupError, match=r"on 2 devices: '0\.weight' on cpu, '1\.weight' on meta"):
        check_one_device(model)
    check_one_device(model[0])


# -- members


def test_a_member_knows_its_own_machine() -> None:
    here = Member.here(1, 2, {"torch": "2"})
    assert Member.from_json(here.to_json()) == here
    assert here.seen_from_here() and here.fate() is None and not here.stopped()
    later = Member(**{**vars(here), "began": "1"})
    assert later.fate() == "has ended without a word: killed, perhaps, or out of memory"
    elsewhere = Member(**{**vars(here), "machine": "other", "began": "1"})
    assert elsewhere.fate() is None


@pytest.mark.parametrize(("code", "words"), [(-15, "was killed by SIGTERM"), (7, "ended with exit code 7")])
def test_a_process_that_ended_tells_its_siblings_how(code: int, words: str) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, Member.here(0, 1).to_json().encode())
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    child = Member.from_json(os.read(reading, 1000))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its exit code
    assert child.fate() == words == ending(code)
    os.waitpid(pid, 0)
    assert child.fate() == "has ended without a word: killed, perhaps, or out of memory"


def test_words() -> None:
    assert ranks([1]) == "rank 1" and ranks([4, 1, 2, 3, 7]) == "ranks 1 to 4, 7" and ranks([1, 2]) == "ranks 1, 2"
    assert ending(-40) == "was killed by signal 40" and ending(-9) == "was killed by SIGKILL (out of memory, perhaps)"


def test_who_listens() -> None:
    with occupied() as port:
        assert str(os.getpid()) in str(listener(port))
    assert listener(port) is None


def test_the_interface_towards_an_address() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("nowhere.invalid") is None
