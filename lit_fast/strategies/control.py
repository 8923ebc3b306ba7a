"""What processes agree on while they train: to stop, to end because of a signal, to validate because time has come.

A process only wishes; what one wishes all do, after the same step. Wishes travel with the gradients (`Riders` of
`distributed/buckets.py`), so no step costs a collective for them. At steps that all processes know (the end of an epoch
or of a validation) they are asked for directly.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fast.distributed.buckets import RIDERS
from lit_fast.distributed.flights import Flights
from lit_fast.errors import MisconfigurationException


class Wish(IntEnum):
    """The seat of each."""

    STOP = 0
    SIGINT = 1
    SIGTERM = 2
    REQUEUE = 3  # the signal by which a cluster says that the job is to be queued again
    VALIDATE = 4
    SYNC_LOGS = 5  # some process logs steps with sync_dist: all take part where a row is due
    SAVE = 6  # the first process's clock says that a checkpoint is due
    LEAVE = 7  # nothing is left of the epoch: all must say so at the same batch

    @classmethod
    def of_signal(cls, number: int) -> Wish:
        return {signal.SIGINT: cls.SIGINT, signal.SIGTERM: cls.SIGTERM}.get(signal.Signals(number), cls.REQUEUE)


SIGNALS = {Wish.SIGINT: signal.SIGINT, Wish.SIGTERM: signal.SIGTERM, Wish.REQUEUE: signal.SIGUSR1}


class Control:
    """One process's wishes, and what all have agreed on.

    Args:
        agreed: is called in every process with the wishes of all, once for each; set when a run begins.
    """

    def __init__(self) -> None:
        self.agreed: Callable[[list[Wish]], None] = lambda wishes: None
        self._wishes = [0.0] * RIDERS
        self._asked: set[Wish] = set()
        self._on_device: tuple[Tensor, Any] | None = None  # sums of the step before, on their way to the host

    def begin(self, agreed: Callable[[list[Wish]], None]) -> None:
        """A new run."""
        self.agreed = agreed
        self._wishes, self._on_device = [0.0] * RIDERS, None
        self._asked.clear()

    def wish(self, wish: Wish) -> None:
        """Ask all processes for it. Safe to call from a signal's handler."""
        self._wishes[wish] = 1.0

    def wished(self, wish: Wish) -> bool:
        return self._wishes[wish] != 0.0

    def knows(self, wish: Wish) -> bool:
        """Whether all processes have heard of it. Between two steps the answer is the same in all of them."""
        return wish in self._asked

    # -- with the gradients

    def board(self, seats: Tensor) -> None:
        if any(self._wishes):
            seats.copy_(torch.tensor(self._wishes))
        else:
            seats.zero_()

    def alight(self, seats: Tensor) -> None:
        """On a GPU the sums are read one step later, when they have long come: nobody waits for the last bucket."""
        if seats.is_cpu:
            self._take(seats)
            return
        before = self._on_device
        host = torch.empty(RIDERS, dtype=seats.dtype, pin_memory=True)
        host.copy_(seats, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._on_device = (host, event)
        if before is not None:
            before[1].synchronize()
            self._take(before[0])

    def settle(self) -> None:
        """Read what came with the newest gradients; a GPU is waited for."""
        before, self._on_device = self._on_device, None
        if before is not None:
            before[1].synchronize()
            self._take(before[0])

    # -- at steps that all know

    def agree(self) -> None:
        """Ask now. Every process must call this at the same step."""
        votes = torch.tensor(self._wishes)
        self._sum(votes)
        self._take(votes)

    def _sum(self, votes: Tensor) -> None:
        dist.all_reduce(votes)

    def watch(self, flights: Flights) -> None:
        """Tell a profiler of what is asked directly."""
        self._sum = flights.timed(self._sum, "agreement")  # type: ignore[method-assign]

    def _take(self, sums: Tensor) -> None:
        heard = sums.tolist()
        if not any(heard):
            return
        if heard[Wish.LEAVE]:
            self._check_that_all_leave(heard[Wish.LEAVE])
        new: list[Wish] = [wish for wish in Wish if heard[wish] and wish not in self._asked and wish is not Wish.LEAVE]
        if new:
            self._asked.update(new)
            self.agreed(new)

    def _check_that_all_leave(self, votes: float) -> None:
        world_size = dist.get_world_size()
        if votes < world_size * (1 - 2**-7):  # as bfloat16 may have rounded them
            mine = "this one too" if self.wished(Wish.LEAVE) else "not this one"
            raise MisconfigurationException(
                f"{votes:.0f} of {world_size} processes ({mine}) ended an epoch where the others had another batch: "
                f"on_train_batch_start returned -1, or the data gave fewer batches than its length says, or a "
                f"training_step(dataloader_iter) had read all of it. End it in all processes at the same batch; data "
                f"of different lengths is cut by limit_train_batches."
            )

    def fulfilled(self, wish: Wish) -> None:
        """It was done and may be wished again. Every process must call this at the same step."""
        self.settle()  # the last step's gradients carried it once more
        self._wishes[wish] = 0.0
        self._asked.discard(wish)
