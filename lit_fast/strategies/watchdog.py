"""No rank waits for ever: one that dies, raises or hangs is named on all others, and they end.

Each rank counts up a number in the process group's store, from a thread of its own. Rank 0 looks at all numbers, the
others look at rank 0's and at one key for the verdict. Beside that each looks whether the next process of its machine
still exists, which tells of a death at once and how it came, and what a rank says of itself is believed before all.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from lit_fast.errors import JobRequeued, ProcessGroupError, RankFailedError, SIGTERMException
from lit_fast.strategies.members import Member, ending, ranks

INTERVAL = 1.0  # seconds between two signs of life
TIMEOUT = 20.0  # seconds of silence after which a rank is given up
GRACE = 5.0  # seconds that a rank's main thread has to notice a verdict
ENDING = 120.0  # seconds that it has for its hooks and its end, once it has noticed
INTERRUPTED = timedelta(
    seconds=10
)  # how long a rank that Ctrl-C or SIGTERM ends waits for the others, which it ends, too
PATIENCE = 3  # intervals of silence that are enough once a collective has failed
BYE = b"bye"
NOTHING = b"-"  # a key that is there and says nothing yet: reading one that is not there waits for it

_running: dict[int, Watchdog] = {}  # of each process by its pid


@dataclass(frozen=True)
class Verdict:
    """Which rank failed, and what is known of it, as the end of a sentence."""

    rank: int
    what: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        return cls(**json.loads(text))


class Silence:
    """For how long ranks have said nothing new, as one sees it that looks now and then.

    A pause of the looker is not held against those it looks at: it may have been stopped, and its machine asleep.

    Example:
        >>> silence = Silence(interval=1.0)
        >>> silence.look(0.0, {0: b"1", 1: b"1"}), silence.look(1.0, {0: b"2", 1: b"1"})
        ({0: 0.0, 1: 0.0}, {0: 0.0, 1: 1.0})
        >>> silence.look(99.0, {0: b"2", 1: b"1"})
        {0: 1.0, 1: 2.0}
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._looked: float | None = None
        self._last: dict[int, tuple[bytes, float]] = {}

    def look(self, now: float, beats: Mapping[int, bytes]) -> dict[int, float]:
        """Seconds of silence of each rank, at `now` by any clock that never goes back."""
        late = 0.0 if self._looked is None else max(0.0, now - self._looked - 2 * self._interval)
        if late:
            late += self._interval
            self._last = {rank: (beat, since + late) for rank, (beat, since) in self._last.items()}
        self._looked = now
        for rank, beat in beats.items():
            if rank not in self._last or self._last[rank][0] != beat:
                self._last[rank] = (beat, now)
        return {rank: now - self._last[rank][1] for rank in beats}


class Watchdog:
    """One rank's part in watching all. It runs from `start` to `leave`, in two threads that hold no lock of Python's.

    Args:
        store: of the process group, keys of this run alone; a connection of its own is made.
        rank: this process's number.
        members: all processes, by rank.
        interval: seconds between two signs of life. Rank 0 reads world size + 2 keys as often, the others three.
        timeout: seconds of silence after which a rank is given up. A rank is silent where its process is stopped, its
            machine or network is down, or one call holds Python's lock all the while. None: silence is never judged,
            for a debugger or such a call; deaths and exceptions are.
        grace: seconds between a verdict and the end of this process, where its main thread has not noticed by then.
        hosts_store: whether the store ends with this process.
        cut: breaks this process's connections to the others, so that a collective that waits for them fails.

    Example:
        >>> here = Member.here(0, 1)
        >>> watchdog = Watchdog(dist.HashStore(), 0, [here])
        >>> watchdog.start()
        >>> watchdog.explain_failure(ValueError("mine"))
        ValueError('mine')
        >>> watchdog.leave()
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[Member],
        *,
        interval: float = INTERVAL,
        timeout: float | None = TIMEOUT,
        grace: float = GRACE,
        hosts_store: bool = False,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self.verdict: Verdict | None = None
        self.rank, self.members = rank, tuple(members)
        self.interval, self.timeout, self.grace = interval, timeout, grace
        self._store = PrefixStore("watch", store)
        self._hosts_store, self._cut = hosts_store, cut
        self._next = self._next_on_this_machine()
        self._lock, self._beating = threading.Lock(), threading.Lock()
        self._decided, self._stopped = threading.Event(), threading.Event()
        self._taken = False  # whether the main thread ends by itself
        self._under_way = False  # whether an exception has been sent to the main thread
        self._interrupted = False  # whether Ctrl-C or SIGTERM ends it
        self._asks = False  # whether its main thread waits to learn who made a collective fail
        self._heard = False
        self._left = False  # whether it is done, and waits for the others
        self._answered = time.monotonic()  # when the store answered last

    @property
    def world_size(self) -> int:
        return len(self.members)

    # -- what the program calls, in its main thread

    def start(self) -> None:
        """Begin to watch and to be watched."""
        if self.world_size == 1:
            return
        self._main = threading.get_ident()
        for key in ["verdict", "doubt", *(f"beat/{rank}" for rank in ({0, self.rank} if self.rank else self._ranks))]:
            self._store.compare_set(key, "", NOTHING.decode())
        self._answered = time.monotonic()
        _running[os.getpid()] = self
        atexit.register(self._at_exit, os.getpid())
        self._own = self._store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        for target, name in ((self._talk, "lit_fast-watchdog"), (self._guard, "lit_fast-watchdog-guard")):
            threading.Thread(target=target, name=name, daemon=True).start()

    def report(self, error: BaseException, phase: str = "") -> None:
        """Tell the others that this rank ends because of `error`.

        What comes from outside is not told: a failed collective (`explain_failure` asks who it was), Ctrl-C, SIGTERM,
        a job that is queued again.

        Args:
            phase: what this rank was doing, as in "while training".
        """
        if self.world_size == 1 or self._stopped.is_set() or is_failed_collective(error):
            return
        with self._lock:
            self._taken = True
        self._interrupted = isinstance(error, (KeyboardInterrupt, SIGTERMException, JobRequeued))
        if self._interrupted or isinstance(error, RankFailedError):
            return
        what = f"failed{phase and ' '}{phase}: {type(error).__name__}: {_first_line(error)}"
        if isinstance(error, SystemExit):
            what = f"ended{phase and ' '}{phase} while the others went on (by sys.exit, or at its program's end)"
        with suppress(RuntimeError):  # the store may be gone with its host
            self._post(Verdict(self.rank, what))
            self._decided.set()
            self._wait_until_heard()

    def explain_failure(self, error: BaseException) -> BaseException:
        """The error to raise in `error`'s place: a RankFailedError where another rank is the cause, else `error`.

        Where a collective failed it waits, a few seconds, until it is known who was its cause. Where nobody was, the
        others are told of the error as of any other.
        """
        if self.world_size == 1 or self._stopped.is_set():
            return error
        if isinstance(error, RankFailedError):
            self._take()
            return error
        if not is_failed_collective(error):
            return error
        with self._lock:
            self._taken = self._asks = True
            known = self.verdict is not None
        if not known:
            with suppress(RuntimeError):
                self._store.compare_set("doubt", NOTHING.decode(), f"rank {self.rank}: {_first_line(error)}")
            self._decided.wait((PATIENCE + 3) * self.interval)
        self._take()
        if self.verdict is None:
            what = f"failed in a collective: {type(error).__name__}: {_first_line(error)}"
            with suppress(RuntimeError):
                self._post(Verdict(self.rank, what))
            return error
        self._wait_until_heard()
        named = self.error()
        named.__cause__ = error
        return named

    def check(self) -> None:
        """Raise the verdict, where there is one."""
        if self.verdict is not None:
            self._take()
            raise self.error()

    def error(self) -> RankFailedError:
        """The verdict as an exception."""
        assert self.verdict is not None, "no rank has failed"
        member = self.members[self.verdict.rank]
        return RankFailedError(self._sentence(), member.rank, member.host, member.pid)

    def leave(self, limit: timedelta = timedelta(minutes=30)) -> None:
        """The end of a run: wait until all ranks have come to theirs, then stop watching. At once where one failed.

        Rank 0 so outlives the others' last look at its store, and nobody is taken for dead who was done.

        Raises:
            RankFailedError: another rank failed meanwhile.
        """
        if self.world_size == 1 or self._stopped.is_set():
            return
        try:
            error = sys.exc_info()[1]
            if error is not None and not self._taken:  # it is on its way out, and nobody has reported it
                self.report(error)
            if self.verdict is None and (self._interrupted or not self._taken):
                self._say_bye(INTERRUPTED if self._interrupted else limit)
        finally:
            self._stopped.set()
            if self.verdict is None or self.verdict.rank != 0:  # else the store may hang with its host
                self._hear(self._store)
            _running.pop(os.getpid(), None)
            if self.verdict is not None:
                faulthandler.cancel_dump_traceback_later()

    # -- its two threads

    def _talk(self) -> None:
        """Says that this rank lives, and looks what is known of the others."""
        store, silence = self._own, Silence(self.interval)
        watched = tuple(self._ranks) if self.rank == 0 else (0,)
        keys = ["verdict", "doubt", *(f"beat/{rank}" for rank in watched)]
        for beat in itertools.count():
            if self._stopped.is_set():
                return
            try:
                with self._beating:
                    if not self._left:
                        store.set(f"beat/{self.rank}", str(beat))
                verdict, doubt, *beats = store.multi_get(keys)
                self._answered = time.monotonic()
                if verdict != NOTHING:
                    self._hear(store)
                    self._handle(Verdict.from_json(verdict))
                    return
                found = self._judge(silence, dict(zip(watched, beats, strict=True)), doubt != NOTHING, store)
                if found is not None:
                    store.compare_set("verdict", NOTHING.decode(), found.to_json())
                    continue  # another rank may have been faster
            except RuntimeError as error:
                if not self._stopped.is_set():
                    self._handle(self._lost_store(error))
                return
            self._stopped.wait(self.interval)

    def _guard(self) -> None:
        """Looks at the other thread, which waits for ever where the store's host hangs or the network is cut."""
        before = time.monotonic()
        while self.timeout is not None and not self._stopped.wait(self.interval):
            now = time.monotonic()
            late, before = now - before - 2 * self.interval, now
            if late > 0:  # this process was stopped, or held Python's lock: the store had no chance to answer
                self._answered += late + self.interval
            if self._decided.is_set():
                return
            if now - self._answered > self.timeout:
                self._handle(
                    Verdict(0, self._silent(0, now - self._answered, "the store at its side has not answered"))
                )
                return

    def _judge(self, silence: Silence, beats: Mapping[int, bytes], doubt: bool, store: Store) -> Verdict | None:
        seconds = silence.look(time.monotonic(), beats)
        if self._next is not None and (how := self._next.fate()) is not None:
            if store.get(f"beat/{self._next.rank}") != BYE:
                return Verdict(self._next.rank, how)
            self._next = None  # it was done
        if self.timeout is None:
            return None
        limit = min(self.timeout, PATIENCE * self.interval) if doubt else self.timeout
        silent = {rank: s for rank, s in seconds.items() if rank != self.rank and beats[rank] != BYE and s > limit}
        if not silent:
            return None
        rank = max(silent, key=lambda rank: (silent[rank], -rank))
        return Verdict(rank, self._silent(rank, silent[rank], "gave no sign of life"))

    # -- verdicts

    def _handle(self, verdict: Verdict) -> None:
        """Name the rank that failed, and end the main thread's waiting."""
        with self._lock:
            if self.verdict is not None or self._stopped.is_set():
                return
            self.verdict = verdict
            ends, asks = self._taken, self._asks
        self._end_within(ENDING if ends else self.grace)
        if not ends or asks:  # what raises an error of its own has told of it
            _say(f"rank {self.rank} (pid {os.getpid()}) ends: {self._sentence()}")
        if verdict.rank == self.rank and ends:
            self._decided.set()
            return
        self._decided.set()
        with suppress(RuntimeError):
            if self._left:  # the main thread waits for all to come to their end
                self._store.set("end", "")
        self._wait_until_heard()
        if self._cut is not None:
            with suppress(Exception):  # what is to end here may have ended
                self._cut()
        if not self._stopped.wait(self.interval):  # a collective that fails now asks explain_failure
            self._raise_in_main()

    def _raise_in_main(self) -> None:
        with self._lock:
            if self._taken or self._stopped.is_set():
                return
            error = self.error()
            # An exception of another thread has no arguments: its class knows them.
            named = type("RankFailedError", (RankFailedError,), {"__init__": lambda new: _as(new, error)})
            self._under_way = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), ctypes.py_object(named))

    def _take(self) -> None:
        """The main thread knows, and has time for its hooks and its end."""
        with self._lock:
            self._taken = True
            if self._under_way and threading.get_ident() == self._main:
                # Let it come now, if it has not come yet. To take it back by setting NULL would leave CPython 3.11's
                # evaluation loop looking for it for ever: every call slower, and one under `sys.setprofile` endless.
                self._under_way = False
                with suppress(RankFailedError):
                    for _ in range(1000):
                        pass
        if self.verdict is not None:
            self._end_within(ENDING)

    def _end_within(self, seconds: float) -> None:
        """Unless `leave` comes before: in C, since the main thread may hold Python's lock, or end the interpreter."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed, or replaced by something that cannot
                stream.flush()
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _post(self, verdict: Verdict) -> None:
        self._store.compare_set("verdict", NOTHING.decode(), verdict.to_json())

    def _hear(self, store: Store) -> None:
        """Count this rank, once, among those that need the store's host no more."""
        if self.rank and not self._heard:
            self._heard = True
            with suppress(RuntimeError):
                store.add("heard", 1)

    def _wait_until_heard(self) -> None:
        """The others ask once in an interval, and can ask only as long as the store's host lives."""
        if not self._hosts_store:
            return
        end = time.monotonic() + 2 * self.interval + 0.5
        others = self.world_size - 1 - (self.verdict is not None and self.verdict.rank != self.rank)
        with suppress(RuntimeError):
            while self._store.add("heard", 0) < others and time.monotonic() < end:
                time.sleep(0.02)

    def _sentence(self) -> str:
        assert self.verdict is not None
        return f"{self.members[self.verdict.rank]} {self.verdict.what}"

    def _silent(self, rank: int, seconds: float, how: str) -> str:
        member = self.members[rank]
        if member.stopped():
            why = "a signal (SIGSTOP) or a debugger holds its process"
        elif member.seen_from_here():
            why = "its process is there, and hangs, or one call holds Python's lock"
        else:
            why = "its process hangs, or its machine or the network to it is down"
        return f"{how} for {seconds:.0f} s: {why}"

    def _lost_store(self, error: RuntimeError) -> Verdict:
        """The store's host closed the connection."""
        end = time.monotonic() + self.interval
        while (how := self.members[0].fate()) is None and self.members[0].seen_from_here() and time.monotonic() < end:
            time.sleep(0.02)  # its sockets close before it is seen to have ended
        return Verdict(0, how or f"cannot be reached: the store at its side is gone ({_first_line(error)})")

    # -- leaving

    def _say_bye(self, limit: timedelta) -> None:
        try:
            with self._beating:
                self._left = True
                self._store.set(f"beat/{self.rank}", BYE.decode())
            if self._store.add("byes", 1) == self.world_size:
                self._store.set("end", "")
            self._store.wait(["end"], limit)
            self.check()
            gone = self._store.add("gone", 1)
            end = time.monotonic() + 2 * self.interval
            while self._hosts_store and gone < self.world_size and time.monotonic() < end:
                time.sleep(0.001)
                gone = self._store.add("gone", 0)
        except RuntimeError as error:
            if self._interrupted:  # the others go on, and this rank does not
                self._post(Verdict(self.rank, "was interrupted by Ctrl-C or SIGTERM"))
                return
            if isinstance(error, dist.DistStoreError) and self.verdict is None:
                late = self._late(limit)
                self.report(late)
                raise late from None
            named = self.explain_failure(error)
            raise named from None if named is error else error

    def _late(self, limit: timedelta) -> ProcessGroupError:
        beats = self._store.multi_get([f"beat/{rank}" for rank in self._ranks])
        late = ranks(rank for rank, beat in enumerate(beats) if beat != BYE)
        return ProcessGroupError(
            f"After {limit.total_seconds():.0f} s of waiting at the end of the run, {late} had not come there, and "
            f"lived. Do all ranks run as many steps, and the same trainer.fit, validate, test and predict?"
        )

    def _at_exit(self, pid: int) -> None:
        """The interpreter ends inside a run: by an exception that nobody reported, sys.exit, or the program's end."""
        if pid != os.getpid() or self._stopped.is_set():
            return
        error = getattr(sys, "last_value", None)
        if isinstance(error, BaseException):
            self.report(error)
            if self.verdict is None:
                self.explain_failure(error)
        elif not self._taken:
            self.report(SystemExit())
        self._stopped.set()

    # -- places

    @property
    def _ranks(self) -> Iterable[int]:
        return range(self.world_size)

    def _next_on_this_machine(self) -> Member | None:
        here = [member.rank for member in self.members if member.seen_from_here()]
        if len(here) < 2 or self.rank not in here:
            return None
        return self.members[here[(here.index(self.rank) + 1) % len(here)]]


def note_death(rank: int, exit_code: int) -> None:
    """Tell all ranks of a process that this one has started and seen end, where this one watches."""
    watchdog = _running.get(os.getpid())
    if watchdog is not None and not watchdog._left:
        with suppress(RuntimeError):
            watchdog._post(Verdict(rank, ending(exit_code)))


def is_failed_collective(error: BaseException) -> bool:
    """Whether an exception is how torch.distributed says that a collective could not be done."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "c10d"))


def _as(new: Any, error: RankFailedError) -> None:
    RankFailedError.__init__(new, str(error), error.rank, error.host, error.pid)


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _say(message: str) -> None:
    with suppress(Exception):  # a closed stderr must not keep this rank from ending
        sys.stderr.write(f"lit_fast: {message}\n")
        sys.stderr.flush()
