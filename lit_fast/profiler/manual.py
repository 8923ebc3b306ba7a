"""What a module in manual optimization calls where it likes, timed while a run is recorded.

Its backwards and clipping go through the strategy (`Strategy.watch`), and its optimizers' steps through
`LightningOptimizer`, which a plan binds. What is left are schedulers, that nothing of ours stands around, and toggling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lit_fast.distributed.flights import put_method
from lit_fast.module import TOGGLES

if TYPE_CHECKING:
    from lit_fast.module import LightningModule
    from lit_fast.profiler.step import StepProfiler


def time_manual(profiler: StepProfiler, module: LightningModule, schedulers: Iterable[Any]) -> Callable[[], None]:
    """Time them from here on; what is returned ends that."""
    undo: list[Callable[[], None]] = []

    for scheduler in schedulers:
        undo.append(put_method(scheduler, "step", profiler.wrap("schedulers", scheduler.step)))
    for name in TOGGLES:
        if name not in vars(module):
            vars(module)[name] = profiler.wrap("optimizer", getattr(module, name))
            undo.append(lambda name=name: vars(module).pop(name, None))  # type: ignore[misc]

    def end() -> None:
        for each in undo:
            each()

    return end
