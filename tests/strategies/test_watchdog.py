"""Signs of life, verdicts, and what a rank does of one."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from new_process import run

from lit_fast.errors import ProcessGroupError, RankFailedError, SIGTERMException
from lit_fast.strategies import watchdog
from lit_fast.strategies.members import Member
from lit_fast.strategies.watchdog import Silence, Verdict, Watchdog, is_failed_collective, note_death

BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9431")


def member(rank: int, world_size: int = 2) -> Member:
    """On a machine that cannot be seen from here."""
    return Member(rank, world_size, f"host-{rank}", 100 + rank, "", "", {})


@contextmanager
def watchdogs(world_size: int = 2, **options: Any) -> Iterator[list[Watchdog]]:
    """Of all ranks, in this process; none is started. Those that were must leave, or have failed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    members = [member(rank, world_size) for rank in range(world_size)]
    options = {"interval": 0.05, "timeout": 0.4} | options
    made = [Watchdog(store.clone(), rank, members, hosts_store=rank == 0, **options) for rank in range(world_size)]
    try:
        yield made
    finally:
        for each in made:
            each._taken = True  # so that it does not wait
            each.leave()


def until(condition: Any) -> None:
    end = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_silence_is_counted_from_the_last_change() -> None:
    silence = Silence(interval=1.0)
    for second, beat in enumerate([b"1", b"2", b"2", b"2", b"3"]):
        seconds = silence.look(float(second), {7: beat})[7]
        assert seconds == [0.0, 0.0, 1.0, 2.0, 0.0][second]


def test_a_pause_of_the_one_that_looks_is_not_silence_of_the_others() -> None:
    silence = Silence(interval=1.0)
    silence.look(0.0, {1: b"1", 2: b"1"})
    silence.look(1.0, {1: b"1", 2: b"2"})
    assert silence.look(3601.0, {1: b"1", 2: b"2"}) == {1: 2.0 + 1.0 - 1.0, 2: 1.0}
    assert silence.look(3602.0, {1: b"1", 2: b"3"}) == {1: 3.0, 2: 0.0}


def test_two_that_live_are_left_alone_and_leave_together() -> None:
    with watchdogs() as (first, second):
        first.start()
        second.start()
        time.sleep(0.6)
        first.check()
        second.check()
        left = threading.Thread(target=first.leave)
        left.start()
        time.sleep(0.6)
        assert left.is_alive() and first.verdict is None  # it waits for the other, and is not taken for dead
        second.leave()
        left.join(5.0)
        assert not left.is_alive() and first.verdict is None and second.verdict is None


def test_a_silent_rank_is_named_in_the_main_thread(capfd: pytest.CaptureFixture[str]) -> None:
    with watchdogs(3) as (first, _, third):
        third._main = 0  # nobody's: this process has one main thread, which is the first rank's here
        first.start()
        third.start()
        third._main = 0
        with pytest.raises(
            RankFailedError, match=r"rank 1 \(host host-1, pid 101\) gave no sign of life for"
        ) as caught:
            while True:
                time.sleep(0.005)
        assert (caught.value.rank, caught.value.host, caught.value.pid) == (1, "host-1", 101)
        assert first.explain_failure(caught.value) is caught.value
        until(lambda: third.verdict is not None)
        third._take()
        assert third.verdict == first.verdict
    said = capfd.readouterr().err.splitlines()
    assert sorted(line.partition(" ends:")[0] for line in said) == [
        f"lit_fast: rank {rank} (pid {os.getpid()})" for rank in (0, 2)
    ]
    assert "its machine or the network to it is down" in said[0]


def test_silence_is_not_judged_where_it_is_switched_off() -> None:
    with watchdogs(timeout=None) as (first, _):
        first.start()
        time.sleep(0.6)
        first.check()


@pytest.mark.parametrize("victim", [0, 1])
def test_what_a_rank_says_of_itself_reaches_the_others(victim: int, capfd: pytest.CaptureFixture[str]) -> None:
    with watchdogs() as both:
        for each in both:
            each.start()
        other = both[1 - victim]
        other._taken = other._asks = True  # as if its main thread had failed in a collective
        error = ValueError("two\nlines")
        both[victim].report(error, "while training")
        assert both[victim].explain_failure(error) is error
        named = other.explain_failure(BROKEN)
        assert (
            str(named)
            == f"rank {victim} (host host-{victim}, pid {100 + victim}) failed while training: ValueError: two"
        )
        assert isinstance(named, RankFailedError) and named.__cause__ is BROKEN
    assert capfd.readouterr().err.count("lit_fast: rank") == 1  # the one that raises needs no line


def test_a_failed_collective_hurries_the_verdict() -> None:
    with watchdogs(timeout=60.0) as (first, _):
        first.start()
        time.sleep(0.2)
        begin = time.monotonic()
        named = first.explain_failure(BROKEN)
        assert time.monotonic() - begin < 1.0
        assert "rank 1 (host host-1, pid 101) gave no sign of life" in str(named)


def test_a_failed_collective_of_nobodys_fault_is_raised_as_it_is_and_told() -> None:
    with watchdogs(timeout=60.0) as (first, second):
        first.start()
        second.start()
        second._taken = True
        assert first.explain_failure(BROKEN) is BROKEN
        until(lambda: second.verdict is not None)
        assert "rank 0 (host host-0, pid 100) failed in a collective: RuntimeError: [gloo" in str(second.error())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SIGTERMException(), BROKEN])
def test_what_comes_from_outside_is_not_reported(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "INTERRUPTED", timedelta(seconds=0.3))
    with watchdogs(timeout=None) as (first, second):
        first.start()
        second.start()
        second._taken = True
        first.report(error)
        time.sleep(0.3)
        assert second.verdict is None
        if error is not BROKEN:  # it ends, and the other one goes on
            first.leave()
            until(lambda: second.verdict is not None)
            assert str(second.error()) == "rank 0 (host host-0, pid 100) was interrupted by Ctrl-C or SIGTERM"


def test_an_error_that_nobody_reported_does_not_wait_for_the_others() -> None:
    with watchdogs(timeout=None) as (first, second):
        first.start()
        second.start()
        second._taken = True
        with pytest.raises(ZeroDivisionError):
            try:
                _ = 1 / 0
            finally:
                first.leave()
        until(lambda: second.verdict is not None)
        assert "rank 0 (host host-0, pid 100) failed: ZeroDivisionError: division by zero" in str(second.error())


def test_a_death_that_a_launcher_saw() -> None:
    with watchdogs() as (first, second):
        second.start()
        first.start()  # the launcher is in its process
        first._taken = second._taken = True
        note_death(1, -15)
        until(lambda: first.verdict is not None and second.verdict is not None)
        assert str(first.error()) == "rank 1 (host host-1, pid 101) was killed by SIGTERM"


def test_a_rank_that_does_not_come_to_the_end_is_named() -> None:
    with watchdogs(timeout=None) as (first, second):
        first.start()
        second.start()
        second._taken = True
        with pytest.raises(ProcessGroupError, match=r"After 0 s of waiting at the end of the run, rank 1 had not come"):
            first.leave(timedelta(seconds=0.2))
        until(lambda: second.verdict is not None)


def test_one_process_watches_nobody() -> None:
    with watchdogs(1) as (alone,):
        threads = threading.active_count()
        alone.start()
        assert threading.active_count() == threads
        alone.report(ValueError("x"))
        assert alone.explain_failure(BROKEN) is BROKEN


def test_which_errors_are_failed_collectives() -> None:
    assert is_failed_collective(BROKEN) and is_failed_collective(dist.DistBackendError("NCCL error"))
    assert not is_failed_collective(RuntimeError("CUDA out of memory")) and not is_failed_collective(ValueError("gloo"))


STUCK = """
import sys, time
import torch.distributed as dist
from lit_fast.strategies.members import Member
from lit_fast.strategies.watchdog import Watchdog

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
members = [Member(rank, 2, "host", rank, "", "", {}) for rank in range(2)]
Watchdog(store, 0, members, interval=0.05, timeout=0.2, grace=0.5, hosts_store=True).start()
print("not yet flushed", end="")

def waits_for_ever():
    time.sleep(1000.0)

waits_for_ever()
"""


@pytest.mark.dist
def test_a_main_thread_that_is_stuck_is_ended_and_shown() -> None:
    process = run(STUCK, timeout=10.0)
    assert process.returncode == 1
    assert process.stdout == "not yet flushed"
    assert "in waits_for_ever" in process.stderr and "rank 1 (host host, pid 1) gave no sign of life" in process.stderr


ENDS = """
import sys
import torch.distributed as dist
from lit_fast.strategies.members import Member
from lit_fast.strategies.watchdog import Watchdog

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
members = [Member(rank, 2, "host", rank, "", "", {}) for rank in range(2)]
Watchdog(store, 1, members, interval=0.05).start()
if sys.argv[2] == "raise":
    raise LookupError("lost")
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "failed: LookupError: lost"),
        ("end", "ended while the others went on (by sys.exit, or at its program's end)"),
    ],
)
def test_an_interpreter_that_ends_inside_a_run_says_so(how: str, says: str) -> None:
    """In an interpreter of its own: a forked one does not end as a program does."""
    import subprocess
    import sys

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [Member(rank, 2, "host", rank, "", "", {}) for rank in range(2)]
    ours = Watchdog(store, 0, members, interval=0.05, hosts_store=True)
    ours.start()
    ours._taken = True
    subprocess.run([sys.executable, "-c", ENDS, str(store.port), how], capture_output=True, timeout=60, check=False)
    until(lambda: ours.verdict is not None)
    assert str(ours.error()) == f"rank 1 (host host, pid 1) {says}"
    ours.leave()


def test_a_verdict_leaves_the_interpreter_as_it_was() -> None:
    """An exception that was sent to a thread and taken back would keep CPython 3.11 looking for it at every call."""
    here = Member.here(0, 2)
    dog = Watchdog(dist.HashStore(), 0, [here, here])
    dog._main = threading.get_ident()
    dog.verdict = Verdict(1, "was killed")
    dog._end_within = lambda seconds: None  # type: ignore[method-assign]
    for sent in (False, True):
        if sent:
            dog._taken = False
            thread = threading.Thread(target=dog._raise_in_main)
            try:
                thread.start()
                thread.join()
            except RankFailedError:
                pass  # it came before it was taken
        assert isinstance(dog.explain_failure(dog.error()), RankFailedError)
        called: list[str] = []
        sys.setprofile(lambda frame, event, argument, called=called: called.append(event))
        try:
            (lambda: None)()
        finally:
            sys.setprofile(None)
        assert "call" in called
