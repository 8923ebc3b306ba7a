"""How a `CombinedLoader` gives its position: by those of its loaders; see `position.py`.

Only data that is trained on needs one, and that is never read sequentially.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lit_fast.data.combined import MODES, CombinedLoader, Walk
from lit_fast.data.randomness import State, check_shape, length_of

if TYPE_CHECKING:
    from lit_fast.data.position import DataPosition


class Batches:
    """The batches of a walk, in the loaders' structure, counted."""

    def __init__(self, data: CombinedLoader, walk: Walk, given: int = 0) -> None:
        self.walk, self.given = walk, given
        self._restore = data.restore

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        batches, _, _ = next(self.walk)
        self.given += 1
        return self._restore(batches)


class CombinedSource:
    """See the module's text; `Source` describes the methods.

    Args:
        positions: one for each loader of `data`.
    """

    kind = "several loaders"
    prefetch_safe = False

    def __init__(self, data: CombinedLoader, positions: list[DataPosition]) -> None:
        self._data, self._positions = data, positions
        self._batches = Batches(data, self._walk())

    def _walk(self) -> Walk:
        return self._data.walk([partial(iter, position) for position in self._positions])

    def begin(self) -> Iterator[Any]:
        self._batches = Batches(self._data, self._walk())
        self._batches.walk.start()
        return self._batches

    def resume(self, state: State) -> Iterator[Any]:
        for position, saved in zip(self._positions, state["positions"], strict=True):
            position.load_state_dict(saved)
        if state["finished"]:
            return iter(())
        walk = self._walk()
        walk.exhausted = list(state["exhausted"])
        ended = [self._has_ended(walk, index) for index in range(len(self._positions))]
        walk.iterators = [
            iter(()) if over else iter(position) for over, position in zip(ended, self._positions, strict=True)
        ]
        self._batches = Batches(self._data, walk, state["consumed"])
        return self._batches

    def handed_out(self) -> int:
        return self._batches.given

    def state(self, consumed: int, finished: bool) -> State:
        behind = self._batches.given - consumed
        return {
            "shape": self._shape(),
            "exhausted": list(self._batches.walk.exhausted),
            "positions": [self._state_of(index, behind, finished) for index in range(len(self._positions))],
        }

    def _state_of(self, index: int, behind: int, finished: bool) -> State:
        """The position of one loader, which is `behind` batches before what it has handed out."""
        position = self._positions[index]
        if finished or self._has_ended(self._batches.walk, index):
            return position.state_dict(finished=True)
        return position.state_dict(max(0, position.handed_out - behind), finished=False)

    def _has_ended(self, walk: Walk, index: int) -> bool:
        """Whether a loader gives None for the rest of the pass; what it drew at its end it must not draw again."""
        return self._data.mode == "max_size" and bool(walk.exhausted[index])

    def _shape(self) -> State:
        return {"the mode": self._data.mode, "the number of loaders": len(self._positions)}

    def check(self, state: State) -> None:
        check_shape(state["shape"], self._shape())

    def length(self, state: State) -> int | None:
        sources = [
            position.length_of(saved) for position, saved in zip(self._positions, state["positions"], strict=True)
        ]
        if state["finished"] or all(length is None for length in sources):
            return None
        lengths: list[int | float] = []
        for source, loader, ended in zip(sources, self._data.flattened, state["exhausted"], strict=True):
            if not ended:  # else it gives None from here on, or begins anew: others decide when the pass ends
                known = length_of(loader) if source is None else source
                lengths.append(math.inf if known is None else known)
        length = MODES[self._data.mode].length(lengths)
        return None if length == math.inf else int(length)

    def explain(self) -> str:
        """What is said of each loader, once."""
        return "; ".join(dict.fromkeys(position.explain() for position in self._positions))

    def close(self) -> None:
        for position in self._positions:
            position.close()
