"""The generators that data depends on: the process-wide ones, and those that it owns."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from lit_fast.checkpoint import rng
from lit_fast.errors import DataError

State = dict[str, Any]

# Objects that a search for generators looks at, and how deep: samplers, datasets and transforms nest a few
# levels; the limits keep a dataset that holds its samples in lists from being walked through.
_MAX_OBJECTS = 2_000
_MAX_DEPTH = 5
_MAX_ITEMS = 64
_LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.Tensor,
    type,
    types.ModuleType,
    types.FunctionType,
)


def find_generators(**roots: object) -> dict[str, Any]:
    """Random generator objects reachable through attributes and containers, by path (`sampler.generator`).

    An object that is reachable on several paths is given once, by the first.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    level = list(roots.items())
    for _ in range(_MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, _LEAVES) or id(value) in seen or len(seen) >= _MAX_OBJECTS:
                continue
            seen.add(id(value))
            if rng.is_generator(value):
                found[path] = value
            else:
                below.extend((f"{path}.{name}", item) for name, item in _children(value))
        level = below
    return found


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())[:_MAX_ITEMS] if isinstance(value, dict) else []
    if isinstance(value, list | tuple):
        return list(enumerate(value[:_MAX_ITEMS]))
    if isinstance(value, types.MethodType):
        return [("__self__", value.__self__)]
    return list(getattr(value, "__dict__", {}).items())


class Randomness:
    """Copies and puts back the process-wide generators (`capture`, `restore`) and those found under `roots`.

    CUDA generators are left out: no loader of data draws from them, and reading one waits for the device.
    """

    def __init__(self, **roots: object) -> None:
        self.own = find_generators(**roots)

    def capture(self) -> State:
        return {"process": rng.capture(cuda=False), "own": self.capture_own()}

    def capture_own(self) -> State:
        return {path: rng.capture_generator(generator) for path, generator in self.own.items()}

    def known(self, states: State) -> State:
        """Those of the states whose generators the data has now."""
        return {path: state for path, state in states.items() if path in self.own}

    def restore(self, state: State) -> None:
        rng.restore(state["process"])
        self.restore_own(state["own"])

    def restore_own(self, states: State) -> None:
        for path in states.keys() & self.own.keys():
            rng.restore_generator(self.own[path], states[path])
        missing = sorted(states.keys() - self.own.keys())
        if missing:
            warnings.warn(
                f"the checkpoint holds the state of generators that the data does not have now: "
                f"{', '.join(missing)}; what is drawn from them does not repeat",
                stacklevel=2,
            )


def changes(before: State, after: State) -> State:
    """The entries of `after` that differ from `before`, two levels deep: most states stay as they were."""
    return {
        group: {key: value for key, value in after[group].items() if not rng.equal(value, before[group].get(key))}
        for group in after
    }


def apply(before: State, changed: State) -> State:
    """What `changes` was computed from: `apply(before, changes(before, after))` is `after`."""
    return {group: {**before[group], **changed[group]} for group in before}


def check_shape(saved: State, now: State) -> None:
    """Raise DataError if a property that decides what batches the data gives is not the saved run's."""
    differences = [
        f"{name} was {saved[name]!r} and is {now[name]!r}"
        for name in saved
        if name in now and saved[name] is not None and now[name] is not None and saved[name] != now[name]
    ]
    if differences:
        raise DataError(
            f"the checkpoint is in the middle of an epoch over other data: {'; '.join(differences)}. Resume "
            "with the data of the saved run, or from a checkpoint that was written at the end of an epoch"
        )


def length_of(data: object) -> int | None:
    """`len(data)`, None where it has none."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def warn_of_replay(batches: int, why: str) -> None:
    """Say before the wait what is being waited for."""
    if batches:
        warnings.warn(f"resuming: fetching {batches} batches again to reach the position, because {why}", stacklevel=5)
