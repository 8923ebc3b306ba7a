"""What a profiler is told of collectives: what was sent, when it had come, and how long it was waited for.

Nothing here runs without one. With one, a `Flights` watches methods that start a collective: what they start is wrapped
in an object that times the wait, and a callback of the collective's future notes when it was over, in the thread of
the process group's that ended it. What lies between the start and the wait is communication behind other work.

That thread has to wait for Python's interpreter, and the next collective for that thread. So only some backwards have
callbacks: none of those in which bucket sizes are measured, the next ones, and then one of 16.
"""

from __future__ import annotations

import copyreg
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

from torch import Tensor

PHASE = "communication"
KEPT = 512  # of the last collectives, for a timeline
FIRST, ALL, EVERY = 7, 16, 16  # the first backward with callbacks, how many follow it, and then which


class Flight(NamedTuple):
    """One collective that has come."""

    name: str  # which collective, of what: "all_reduce gradients 3"
    nbytes: int  # of the whole tensor that it moves
    begin: int  # ns since the run's
    end: int


class Flights:
    """The collectives of one run.

    Attributes:
        bytes: by what they moved.

    Args:
        wrap: a profiler's, `wrap(phase, function, part)`: the same function, timed.
        block: a profiler's, `block(phase, part)`: a context that is timed.
        counts: whether time counts now, for phases and steps.

    Example::

        flights.watch(exchange, "start", "work", "all_reduce", "gradients", nbytes=tensor.nbytes)
        exchange.start(tensor)  # sets exchange.work
        exchange.work.wait()
    """

    def __init__(
        self,
        wrap: Callable[..., Callable[..., Any]],
        block: Callable[..., AbstractContextManager[None]],
        counts: Callable[[], bool],
    ) -> None:
        self._wrap, self._block, self._counts = wrap, block, counts
        self.begin(on_host=True)

    def begin(self, on_host: bool) -> None:
        """A run begins; `on_host`: its collectives move the host's memory, so that its clock can time them."""
        self._on_host, self._began = on_host, time.perf_counter_ns()
        self._hidden: int | None = None  # in the backwards that were drawn
        self._backwards = self._drawn = 0
        self._draws = True  # whether callbacks are wanted now
        self.bytes: dict[str, float] = {}
        self._waits: dict[str, Callable[..., Any]] = {}
        self._landed: deque[Flight] = deque(maxlen=KEPT)
        self._covered = 0  # until when `_hidden` has been counted
        self._waited: list[tuple[int, int]] = []  # after that: whoever is woken late waits while others are under way

    # -- what is timed

    def timed(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        """`function`, which returns when all processes have called it: its time is communication."""
        return self._wrap(PHASE, function, what)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """A context whose time is communication, good for one `with` at a time."""
        return self._block(PHASE, what)

    def answering(self, ask: Callable[..., Any], what: str) -> Callable[..., Any]:
        """`ask`, which starts something and returns what it is waited for by: with a timed `wait`."""
        wait = self.timed(_wait, what)
        return lambda *args: _UnderWay(ask(*args), wait, lambda *_: None, tells=False)

    def sending(self, function: Callable[..., Any], collective: str, what: str) -> Callable[..., Any]:
        """`function`, a collective of the tensors among its arguments, which may return one that is under way."""
        timed, name = self.timed(function, what), f"{collective} {what}"

        def sends(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            work = timed(*args, **kwargs)
            nbytes = max(each.nbytes for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            if hasattr(work, "wait"):
                return self._under_way(work, name, what, nbytes, begin)
            if self._counts():
                self.bytes[what] = self.bytes.get(what, 0.0) + nbytes
                end = time.perf_counter_ns()
                self._land(name, nbytes, begin, begin, end, end if self._on_host else None)
            return work

        return sends

    def watch(
        self,
        owner: Any,
        method: str,
        attribute: str,
        collective: str,
        what: str,
        nbytes: int,
        number: int | None = None,
    ) -> None:
        """Watch what `owner.<method>` starts and leaves in `owner.<attribute>`, from here on.

        Args:
            collective: its name among torch.distributed's.
            what: what it moves: the part that waiting for it belongs to.
            nbytes: of the whole tensor.
            number: which of those.
        """
        # An attribute that held `owner` would keep the memory of its bucket until Python's garbage is collected.
        start, held = getattr(type(owner), method), weakref.ref(owner)
        name = f"{collective} {what}" if number is None else f"{collective} {what} {number}"

        def watched(*args: Any, **kwargs: Any) -> Any:
            owner: Any = held()
            before, begin = getattr(owner, attribute), time.perf_counter_ns()
            result = start(owner, *args, **kwargs)
            work = getattr(owner, attribute)
            if work is not None and work is not before:
                setattr(owner, attribute, self._under_way(work, name, what, nbytes, begin))
            return result

        setattr(owner, method, watched)

    def _under_way(self, work: Any, name: str, what: str, nbytes: int, begin: int) -> Any:
        if not self._counts():
            return work
        wait = self._waits.get(what)
        if wait is None:
            wait = self._waits[what] = self.timed(_wait, what)
        self.bytes[what] = self.bytes.get(what, 0.0) + nbytes
        return _UnderWay(work, wait, partial(self._land, name, nbytes, begin), self._on_host and self._draws)

    def backward_begins(self) -> None:
        """Decide whether its collectives, and all until the next one, are told of when they are over."""
        if self._counts():
            number = self._backwards
            self._draws = number >= FIRST and (number < FIRST + ALL or number % EVERY == FIRST)
            self._backwards += 1
            self._drawn += self._draws

    # -- what was measured

    @property
    def hidden(self) -> int | None:
        """ns in which a collective was under way and this process did something else: the union of all, less the waits.

        Of all backwards, estimated by those that were drawn. None where nobody could tell when any was over: on a GPU,
        without futures, or in a run of a few steps.
        """
        hidden = self._hidden
        return hidden if hidden is None or not self._drawn else hidden * self._backwards // self._drawn

    def _land(self, name: str, nbytes: int, begin: int, asked: int, woken: int, end: int | None) -> None:
        """It was waited for from `asked` to `woken`, and over at `end`."""
        if end is None or not self._counts():
            return
        self._landed.append(Flight(name, nbytes, begin - self._began, end - self._began))
        first, last = max(begin, self._covered), min(asked, end)
        waited = sum(max(0, min(last, until) - max(first, since)) for since, until in self._waited)
        self._hidden = (self._hidden or 0) + max(0, last - first - waited)
        self._covered = max(self._covered, end)
        self._waited = [wait for wait in (*self._waited, (asked, woken)) if wait[1] > self._covered]

    def landed(self) -> list[Flight]:
        """The last ones, in the order in which they were waited for; from any thread."""
        return list(self._landed)


def put_method(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Have `owner.<name>(...)` call `function(...)`; what is returned takes it away again.

    By a class that only `owner` has, which is no other to isinstance: an attribute would come into the state that
    `owner` saves, and would not be found where `owner` itself is called.
    """
    kind: Any = type(owner)
    # A function of the class would be given `owner`; this one is bound already.
    timed = type(kind.__name__, (kind,), {name: staticmethod(function), "__module__": kind.__module__})

    def as_before(self: Any, protocol: SupportsIndex) -> Any:
        """A copy, or what is unpickled, is of the class itself."""
        made = kind.__reduce_ex__(self, protocol)
        if isinstance(made, str):
            return made
        make, given, *rest = made
        make = _new if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]  # which pickle looks into
        return make, tuple(kind if each is timed else each for each in given), *rest

    timed.__reduce_ex__ = as_before  # type: ignore[method-assign,assignment]
    owner.__class__ = timed
    return lambda: setattr(owner, "__class__", kind)


def _new(kind: type, *given: Any) -> Any:
    return kind.__new__(kind, *given)


def _wait(work: Any, *args: Any) -> Any:
    return work.wait(*args)


class _UnderWay:
    """A `torch.distributed.Work` whose wait is timed."""

    __slots__ = ("_ended", "_land", "_wait", "_work")

    def __init__(
        self, work: Any, wait: Callable[..., Any], land: Callable[[int, int, int | None], None], tells: bool
    ) -> None:
        self._work, self._wait = work, wait
        self._land: Callable[[int, int, int | None], None] | None = land
        self._ended: list[int] | None = [] if tells else None
        if self._ended is not None:
            try:
                work.get_future().add_done_callback(partial(_note_end, self._ended))
            except (RuntimeError, NotImplementedError):  # a backend whose collectives have no futures
                self._ended = None

    def wait(self, *args: Any) -> Any:
        asked = time.perf_counter_ns()
        result = self._wait(self._work, *args)
        woken, land = time.perf_counter_ns(), self._land
        self._land = None
        if land is not None:  # the callback may come later than who waits is woken
            land(asked, woken, None if self._ended is None else min([woken, *self._ended]))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _note_end(ended: list[int], _: Any) -> None:
    ended.append(time.perf_counter_ns())
