"""What processes that read one data set must agree on: where they are in it, and when an epoch ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch

from lit_fast.data.randomness import State
from lit_fast.errors import DataError, PossibleUserWarning


def for_rank(states: Sequence[State] | State, rank: int, world_size: int) -> State:
    """The position in the data that one process goes on from, out of those that all processes of a run saved.

    With as many processes as before it is that process's own, random states of its workers included. Otherwise
    `DataPosition` deals out anew what is left of the epoch.

    Args:
        states: `DataPosition.state_dict` of every process, by rank. One of them alone will do where the others could
            not be asked, when the run failed: each sample still comes once; random states of workers are not restored.
        rank, world_size: of the process that goes on.

    Raises:
        DataError: the processes were not at the same batch of the same epoch.

    Example:
        >>> from lit_fast.data import DataPosition
        >>> from lit_fast.data.samplers import distribute
        >>> from torch.utils.data import DataLoader
        >>> def position(rank, world):
        ...     share = {"num_replicas": world, "rank": rank}
        ...     return DataPosition(distribute([DataLoader(range(12))], "test", "data", share)[0])
        >>> four = [position(rank, 4) for rank in range(4)]
        >>> [next(iter(each)).item() for each in four]
        [0, 1, 2, 3]
        >>> states = [each.state_dict() for each in four]
        >>> three = [position(rank, 3) for rank in range(3)]
        >>> for rank, each in enumerate(three):
        ...     each.load_state_dict(for_rank(states, rank, world_size=3))
        >>> [[batch.item() for batch in each] for each in three]  # process 2 would have no third batch: it repeats one
        [[4, 7, 10], [5, 8, 11], [6, 9, 4]]
    """
    states = [states] if isinstance(states, dict) else states
    then = max(len(states), states[0].get("world_size", 1))
    if then == len(states) == world_size:
        return states[rank]
    places = [tuple(state.get(name) for name in ("begun", "epoch", "consumed", "finished")) for state in states]
    if len(set(places)) > 1:
        raise DataError(
            f"the {then} processes that wrote the checkpoint were not at the same place in their data (begun, "
            f"epoch, batches, finished: {'; '.join(map(str, places))}), so that what is left of it cannot be shared "
            f"out among {world_size}. Resume with {then} processes, or from another checkpoint"
        )
    return _of_others(states[rank % len(states)], then, world_size)


def _of_others(state: State, then: int, now: int) -> State:
    if not state["begun"]:
        return state
    state = {**state, "processes": [then, now]}
    if "positions" in state:  # of several loaders
        state["positions"] = [_of_others(each, then, now) for each in state["positions"]]
    return state


def agree_on_length(lengths: Sequence[int | None], name: str) -> int | None:
    """How many batches an epoch has in every process, where each has so many; None where one does not know.

    Args:
        lengths: batches in each process, by rank.
        name: what to call the data.

    Raises:
        DataError: a process has none, and others have some.

    Example:
        >>> agree_on_length([3, 3], "training data"), agree_on_length([3, None], "training data")
        (3, None)
    """
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        return None
    shortest, longest = min(known), max(known)
    if shortest == longest:
        return shortest
    described = ", ".join(f"{length} in process {rank}" for rank, length in enumerate(known))
    if not shortest:
        raise DataError(
            f"The {name} has no batch in process {known.index(0)}, and others wait for it: {described}. Give every "
            f"process at least one batch."
        )
    warnings.warn(
        f"The {name} differs in length from process to process: {described}. Epochs end after {shortest} batches in "
        f"all of them, and {sum(known) - shortest * len(known)} batches are not read.",
        category=PossibleUserWarning,
        stacklevel=3,
    )
    return shortest


def settle_length(
    length: int | None, total: int | None, name: str, all_gather: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[int | None, int | None]:
    """The length of a pass over data, and how many batches of it are used, as `agree_on_length` settles them.

    Args:
        length, total: as this process knows them; None where it does not. Limits are the same in every process.
        name: what to call the data.
        all_gather: gives the tensors of all processes, stacked.

    Returns:
        Both; the length is None in every process where it is in one.
    """
    known = torch.tensor([-1 if each is None else each for each in (length, total)])
    lengths, totals = ([None if each < 0 else each for each in column] for column in all_gather(known).T.tolist())
    if None in lengths:
        return None, totals[lengths.index(None)]
    return length, agree_on_length(totals, name)


class Verdict(Protocol):
    """The answer of all processes to whether they have another batch; it may still be on its way."""

    def wait(self) -> list[int]:
        """Wait for it. Returns the ranks of those that have none."""
        ...


class _Flags:
    """One flag a process, added up over a process group."""

    def __init__(self, flags: torch.Tensor, work: Any) -> None:
        self._flags, self._work = flags, work

    def wait(self) -> list[int]:
        self._work.wait()
        return [rank for rank, ended in enumerate(self._flags.tolist()) if ended]


def agreement(timeout: timedelta | None = None) -> Callable[[bool], Verdict]:
    """What `together` asks: an all-reduce of one byte a process, which goes on by itself.

    Makes a process group of its own, over the CPU, so that every process calls this at the same point.

    Args:
        timeout: how long an answer is waited for.
    """
    import torch.distributed as dist

    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)

    def agree(has_batch: bool) -> Verdict:
        flags = torch.zeros(world_size, dtype=torch.uint8)
        flags[rank] = not has_batch
        return _Flags(flags, dist.all_reduce(flags, group=group, async_op=True))

    return agree


def together(batches: Iterator[Any], agree: Callable[[bool], Verdict], name: str = "data") -> Iterator[Any]:
    """Batches of data of unknown length, ending in every process after the same one.

    Reads one batch ahead and asks at once whether all processes have theirs; the answer is waited for when that batch
    is asked for, so that it travels while the batch before it is used.

    Args:
        batches: this process's own.
        agree: starts to ask every process whether it has another batch; `agreement` makes one. Each process asks as
            often as the others.
        name: what to call the data in the warning that some processes had more.

    Example:
        >>> class Alone:
        ...     def __init__(self, has_batch):
        ...         self.ended = [] if has_batch else [0]
        ...     def wait(self):
        ...         return self.ended
        >>> list(together(iter("abc"), Alone))
        ['a', 'b', 'c']
    """
    nothing = object()
    given = 0
    ahead = next(batches, nothing)
    verdict = agree(ahead is not nothing)
    while not (ended := verdict.wait()):
        batch, ahead = ahead, next(batches, nothing)
        verdict = agree(ahead is not nothing)
        given += 1
        yield batch
        del batch
    if ahead is not nothing:
        which = f"process {ended[0]} has" if len(ended) == 1 else f"processes {', '.join(map(str, ended))} have"
        warnings.warn(
            f"The {name} ends here after {given} batches, because {which} no more. This process has at least one more "
            f"batch, which is not used; share the data out evenly to use all of it.",
            category=PossibleUserWarning,
            stacklevel=2,
        )
