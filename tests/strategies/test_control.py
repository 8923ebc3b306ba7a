"""Wishes on their way through the sums of all processes, without processes: sums are written by hand."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.distributed as dist

from lit_fast.distributed.buckets import RIDERS
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.control import SIGNALS, Control, Wish


class Heard:
    """A run's control, and what it has been told."""

    def __init__(self) -> None:
        self.told: list[list[Wish]] = []
        self.control = Control()
        self.control.begin(self.told.append)

    def step(self, **others: float) -> None:
        """One step, in which the other processes' wishes are `others`."""
        seats = torch.full((RIDERS,), torch.nan)
        self.control.board(seats)
        for name, votes in others.items():
            seats[Wish[name]] += votes
        self.control.alight(seats)


def test_every_wish_has_a_seat() -> None:
    assert sorted(Wish) == list(range(len(Wish))) and len(Wish) <= RIDERS


def test_a_wish_of_any_process_is_told_once() -> None:
    heard = Heard()
    heard.step()
    assert heard.told == []
    heard.step(STOP=1.0)
    heard.step(STOP=1.0, SIGTERM=2.0)
    assert heard.told == [[Wish.STOP], [Wish.SIGTERM]]
    assert heard.control.knows(Wish.STOP) and not heard.control.wished(Wish.STOP)


def test_what_is_done_may_be_wished_again() -> None:
    heard = Heard()
    for _ in range(2):
        heard.control.wish(Wish.VALIDATE)
        heard.step()
        assert heard.control.knows(Wish.VALIDATE)
        heard.control.fulfilled(Wish.VALIDATE)
        heard.step()
        assert not heard.control.knows(Wish.VALIDATE)
    assert heard.told == [[Wish.VALIDATE]] * 2


def test_a_new_run_knows_nothing_of_the_last_one() -> None:
    heard = Heard()
    heard.control.wish(Wish.STOP)
    heard.step()
    heard.control.begin(heard.told.append)
    heard.step()
    assert heard.told == [[Wish.STOP]] and not heard.control.knows(Wish.STOP)


def test_signals_have_wishes() -> None:
    assert Wish.of_signal(signal.SIGINT) is Wish.SIGINT
    assert Wish.of_signal(signal.SIGTERM) is Wish.SIGTERM
    assert Wish.of_signal(signal.SIGUSR1) is Wish.REQUEUE
    assert set(SIGNALS) == {Wish.SIGINT, Wish.SIGTERM, Wish.REQUEUE}


@pytest.mark.parametrize("here", [True, False], ids=["leaves", "stays"])
def test_an_epoch_that_some_leave_is_an_error(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    heard = Heard()
    if here:
        heard.control.wish(Wish.LEAVE)
    with pytest.raises(MisconfigurationException, match=r"of 4 processes \((this one too|not this one)\)"):
        heard.step(LEAVE=2.0)


def test_all_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 1000)
    heard = Heard()
    heard.control.wish(Wish.LEAVE)
    heard.step(LEAVE=997.0)  # as a sum in 16 bits may come out
    assert heard.told == []
