"""Logged values of several processes: those that `self.log(..., sync_dist=True)` asked for become the values of all.

That takes one message however many names there are, at steps that every process comes to: where a row is due for the
loggers, and at the ends of epochs and of evaluations. In between nobody asks anybody, so what is read there is this
process's own value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_fast.distributed.flights import put_method
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.control import Wish

if TYPE_CHECKING:
    from lit_fast.log_slots import Slot
    from lit_fast.strategies.strategy import Strategy

CAPACITY = 64  # numbers of one message; what does not fit goes in a second one


class LogSync:
    """Makes values the same in all processes of a strategy.

    Each message begins with a digest of the names that it is about. Where processes have come with different names,
    or to different places, they see that in the first message, and every one of them raises the same error.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    # -- values of single steps

    def ask_for_steps(self) -> None:
        """This process logs steps with `sync_dist`: the others hear of it with the gradients of this very step."""
        if self.strategy.control is not None:
            self.strategy.control.wish(Wish.SYNC_LOGS)

    @property
    def steps(self) -> bool:
        """Whether all know that steps are logged so. The same answer everywhere, between two steps."""
        control = self.strategy.control
        if control is None:
            return False
        control.settle()
        return control.knows(Wish.SYNC_LOGS)

    # -- one message

    def share(self, slots: Sequence[Slot], epoch: bool, where: str) -> None:
        """Set `shared` of each slot that is to be synchronized.

        Every process has to call it at the same place, those too that have nothing to share.

        Args:
            slots: those that are due here.
            epoch: values of the epoch, or those of the newest step.
            where: what else has to be the same everywhere, such as the stage.

        Raises:
            MisconfigurationException: in every process, where they logged different names.
        """
        synced = [slot for slot in slots if slot.syncs]
        names = [f"{slot.name}{slot.loader} ({slot.describe()})" for slot in synced]
        digest = _digest([where, "epoch" if epoch else "step", *names])
        groups: dict[Any, list[Slot]] = {None: []}
        for slot in synced:
            groups.setdefault(slot.meant.sync_dist_group, []).append(slot)
        for group, members in groups.items():
            sent = [slot.sent(epoch) for slot in members]
            rows = self._exchange(digest, [number for numbers in sent for number in numbers], names, where, group)
            begin = 0
            for slot, numbers in zip(members, sent, strict=True):
                if numbers:
                    value = slot.merged(rows[:, begin : begin + len(numbers)], epoch)
                    slot.shared = (slot.version(), epoch, value.item() if value.is_cpu else value.to(slot.dtype))
                begin += len(numbers)
        for slot in synced:  # metrics ask the other processes themselves, in an order that the digest has made sure of
            if slot.is_metric:
                slot.shared = (slot.version(), epoch, self._of_metric(slot, epoch))

    def _of_metric(self, slot: Slot, epoch: bool) -> Any:
        """Its value of all processes; what it asks them is told to a profiler, where there is one."""
        flights, undo = self.strategy.flights, None
        if flights is not None:
            metric: Any = getattr(slot, "metric")  # noqa: B009  # of a MetricSlot, as `is_metric` says
            undo = put_method(metric, "sync", flights.timed(metric.sync, "metrics"))
        try:
            return slot.epoch_value() if epoch else slot.step_value()
        finally:
            if undo is not None:
                undo()

    def _exchange(self, digest: float, numbers: list[Any], names: list[str], where: str, group: Any) -> Tensor:
        """Everyone's numbers, shape (processes, len(numbers)), float64."""
        device = self.strategy.root_device
        room = CAPACITY - 1
        first = [digest, *numbers[:room], *[0.0] * max(0, room - len(numbers))]
        rows = self.strategy.all_gather(_message(first, device), group)
        if bool((rows[:, 0] != digest).any()):  # waits for a GPU: a row is about to be read, or an epoch is over
            self._refuse(names, where, group)
        rows = rows[:, 1:]
        if len(numbers) > room:
            rest = self.strategy.all_gather(_message(numbers[room:], device), group)
            rows = torch.cat([rows, rest], dim=1)
        return rows

    def _refuse(self, names: list[str], where: str, group: Any) -> None:
        everyones: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyones, (where, names), group=group)
        lines = []
        for place, (their_place, theirs) in enumerate(everyones):
            missing = sorted({name for _, others in everyones for name in others} - set(theirs))
            what = f"not {', '.join(missing)}" if missing else "all of them"
            lines.append(f"process {place} in `{their_place}` logged {what}")
        raise MisconfigurationException(
            f"The processes logged different names with sync_dist=True, or metrics, so their values cannot be put "
            f"together: {'; '.join(lines)}. Log every such name in all processes, at the same steps; a value that only "
            f"some have is logged without sync_dist."
        )


def _digest(parts: list[str]) -> float:
    """48 bits, which a float64 holds exactly."""
    text = "\n".join(parts).encode()
    return float(int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big"))


def _message(numbers: list[Any], device: torch.device) -> Tensor:
    if not any(isinstance(number, Tensor) for number in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
