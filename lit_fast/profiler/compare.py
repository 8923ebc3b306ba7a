"""Ours against a loop by hand: the same module, data and seed in one process, in alternating windows of steps.

A machine's speed drifts, and other programs come and go: a ratio is worth something only between things that were
measured side by side. So both sides run a window of steps in turns, each going on where its last window ended, with
weights, data and random generators of its own; which one begins alternates. Each pair of windows gives a ratio; the
median of them is reported, with an interval from resampling the pairs.

Both sides are timed by the same clock, which costs both the same for each call. The borders lie between two steps of
our fit, in the loop's data iterator, where no phase is open: nothing is added to a step, and what happens there is
taken off.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_fast.backward import loss_of
from lit_fast.callbacks.callback import Callback
from lit_fast.checkpoint import rng
from lit_fast.errors import ProfileError
from lit_fast.hooks import is_overridden
from lit_fast.loggers.logger import DummyLogger
from lit_fast.module import LightningModule
from lit_fast.profiler.eager import EagerLoop, refuse
from lit_fast.profiler.record import PHASES, Compared, Comparison
from lit_fast.profiler.step import StepProfiler

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

WINDOWS = 20  # pairs that count; one before them warms up
FEWEST = 5  # below, an interval says nothing
DRAWS = 10_000  # of the bootstrap

# Largest relative difference of losses. In 64 and 32 bits, of each step: both sides do the same arithmetic but for the
# last bit of a root (torch's loops, optim/adopt.py), which training carries on. In 16 bits such a bit moves roundings,
# by 2^-8 of a value in bfloat16 and 2^-11 in float16, and training makes noise of them: single steps differ, means do
# not, so the means of windows are compared.
LOSS_BOUND, LOSS_BOUND_16_BITS = 1e-5, 2e-2


class Borders(StepProfiler):
    """Our side's clock, with a visitor between two steps wherever a window ends."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.left = 0  # micro-batches of the running window

    def visit(self) -> int:
        """Called before a window; returns how many micro-batches it has."""
        raise NotImplementedError

    def wrap_batches(self, batches: Iterator[Any], phase: str = "data") -> Iterator[Any]:
        timed = super().wrap_batches(batches, phase)
        while True:
            if not self.left:
                self.left = self.visit()
            for batch in islice(timed, self.left):
                self.left -= 1
                yield batch
            if self.left:  # the epoch ended within a window
                return


class Alternation(Borders):
    """Both sides' windows. Our side is the `fit` that this clock is the profiler of; the other one runs at its borders.

    Args:
        trainer: of our side.
        other: makes the other side, at the first border.
        size: micro-batches of a window.
        windows: pairs, one to warm up included.
    """

    def __init__(self, trainer: Trainer, other: Any, size: int, windows: int) -> None:
        super().__init__()
        self.trainer, self.make, self.size, self.windows = trainer, other, size, windows
        self.other: EagerLoop | None = None
        self.began: dict[str, float] | None = None
        self.ours: list[dict[str, float]] = []
        self.theirs: list[dict[str, float]] = []
        self.random: rng.State = {}  # of the other side, while ours runs

    def begin(self) -> None:
        """From the state that the random generators have now, both sides go on."""
        self.random = rng.capture()

    def visit(self) -> int:
        if self.began is not None:
            self.ours.append(_between(self.began, self._now(self)))
        done = len(self.ours)
        with_ours = rng.capture()
        while len(self.theirs) < self._due(done):
            self._run_other()
        rng.restore(with_ours)
        if done == self.windows:
            self.trainer.should_stop = True
            return 1  # the loop looks only after a step
        self.began = self._now(self)
        return self.size

    def _due(self, done: int) -> int:
        """Windows that the other side has run when ours begins its next one: it begins the pairs 0, 2, 4, ..."""
        return min(done + 1 - done % 2, self.windows)

    def _run_other(self) -> None:
        rng.restore(self.random)
        if self.other is None:
            self.other = self.make()
            self.other.clock.start()
        began = self._now(self.other.clock)
        deque(islice(self.other.steps, self.size), maxlen=0)
        self.theirs.append(_between(began, self._now(self.other.clock)))
        self.random = rng.capture()

    def _now(self, clock: StepProfiler) -> dict[str, float]:
        """Seconds by phase so far, once the device has done what it was given."""
        if self.trainer.config.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.config.device)
        return clock.phases()


def _between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}


class Prepared:
    """What a comparison begins from: copies of everything that a fit changes, made before it.

    Args:
        trainer: whose options, callbacks and loggers are copied, less those that stop, save or show.
        module: of which each side gets a copy.
        data, datamodule: as passed to `fit`.

    Raises:
        ProfileError: there is no loop by hand for it, or something cannot be copied.
    """

    def __init__(self, trainer: Trainer, module: Any, data: Any = None, datamodule: Any = None) -> None:
        if not isinstance(module, LightningModule):
            raise ProfileError(
                f"fit was given {type(module).__name__}; a comparison needs the LightningModule itself, not a compiled "
                f"or wrapped one."
            )
        if isinstance(data, Iterator):
            raise ProfileError(
                f"The training data ({type(data).__name__}) can be read only once, and a comparison reads it several "
                f"times; pass an object whose __iter__ begins anew, or use --against none."
            )
        refuse(module, trainer)
        self.notes: list[str] = []
        self.random = rng.capture()
        self.datamodule = datamodule
        self.modules = [_copied(module, {}), _copied(module, {})]
        self.data = [_copied_data(data), _copied_data(data)]
        self.trainer = self._copied_trainer(trainer)

    def _copied_trainer(self, trainer: Trainer) -> Trainer:
        kept = [callback for callback in trainer.callbacks if not _is_left_out(callback)]
        left_out = [type(callback).__name__ for callback in trainer.callbacks if _is_left_out(callback)]
        if left_out:
            self.notes.append(f"left out of our side: {', '.join(left_out)}")
        if trainer.loggers:
            self.notes.append("our side's loggers write nothing")
        if is_overridden("validation_step", self.modules[0], LightningModule) and trainer.limit_val_batches:
            self.notes.append("neither side validates")
        known = {
            id(trainer.callbacks): _copied(kept, {}),
            id(trainer.loggers): [DummyLogger()] if trainer.loggers else [],
        }
        made: Trainer = _copied(trainer, known)
        made.limit_val_batches = made.num_sanity_val_steps = 0
        made.fit_loop.min_epochs = made.fit_loop.min_steps = None  # they would hold back the end
        return made

    def against_eager(self, size: int, windows: int = WINDOWS) -> tuple[Comparison, str]:
        """Run both sides; the comparison, and the source of the loop by hand.

        Args:
            size: micro-batches of a window, a multiple of the accumulation.

        Raises:
            ProfileError: there is no loop by hand for it, or the fit ends too early.
        """
        ours, theirs = self.modules
        losses, their_losses = record_losses(ours), record_losses(theirs)

        def other() -> EagerLoop:
            return EagerLoop(theirs, self.trainer, self.data[1], self.datamodule, StepProfiler())

        before = rng.capture()
        rng.restore(self.random)
        turns = Alternation(self.trainer, other, size, windows + 1)
        turns.begin()
        self.trainer.profiler = turns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit that was recorded has said it
            self.trainer.fit(ours, self.data[0], datamodule=self.datamodule)
        rng.restore(before)
        pairs = min(len(turns.ours), len(turns.theirs))
        if pairs <= FEWEST or turns.other is None:
            raise ProfileError(
                f"The fit ended after {pairs} windows of {size} micro-batches; at least {FEWEST + 1} are needed for an "
                f"interval. Train longer (max_steps, max_epochs), or take fewer steps a window: --steps "
                f"{max(1, pairs * size // 2)}."
            )
        few_bits = "16" in self.trainer.precision
        comparison = Comparison(
            "eager",
            rows=rows(turns.ours[1:pairs], turns.theirs[1:pairs], size, paired=True),
            windows=pairs - 1,
            steps=size,
            largest_loss_difference=largest_difference(losses, their_losses, size if few_bits else 1),
            loss_bound=LOSS_BOUND_16_BITS if few_bits else LOSS_BOUND,
            notes=self.notes,
        )
        return comparison, turns.other.source


def _is_left_out(callback: Callback) -> bool:
    """Callbacks that stop, save or show: a loop by hand has none, and what they would do was recorded already."""
    kinds = {"Checkpoint", "EarlyStopping", "ProgressBar", "ModelSummary"}
    return any(kind.__name__ in kinds for kind in type(callback).__mro__)


def _copied(value: Any, known: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, dict(known))
    except Exception as error:
        raise ProfileError(
            f"A comparison trains copies, and {type(value).__name__} cannot be copied "
            f"({type(error).__name__}: {error}). Use --against none."
        ) from error


def _copied_data(data: Any) -> Any:
    """Loaders with generators of their own; what they read is shared, unless it has a state (an IterableDataset)."""
    if isinstance(data, DataLoader):
        shared = {} if isinstance(data.dataset, IterableDataset) else {id(data.dataset): data.dataset}
        return _copied(data, shared)
    if type(data) is dict:
        return {name: _copied_data(item) for name, item in data.items()}
    if type(data) in (list, tuple) and any(isinstance(item, DataLoader) for item in data):
        return type(data)(_copied_data(item) for item in data)
    return data


# -- losses


def record_losses(module: LightningModule) -> list[Tensor]:
    """From here on the loss of each `training_step` (in manual optimization: of each `manual_backward`) is kept.

    Both sides pay the same for it, within their forward.
    """
    losses: list[Tensor] = []
    if module.automatic_optimization:
        step = module.training_step

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            loss = output if isinstance(output, Tensor) else loss_of(output)
            if loss is not None:
                losses.append(loss.detach())
            return output

        module.__dict__["training_step"] = training_step
    else:
        backward = module.manual_backward

        @wraps(backward)
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses.append(loss.detach())
            backward(loss, *args, **kwargs)

        module.__dict__["manual_backward"] = manual_backward
    return losses


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], steps: int = 1) -> float | None:
    """Of two losses of the same step, or means of `steps` of them, relative to the larger; None where there were none.

    Below a thousandth of the largest loss it is relative to that: what is left of a loss that is nearly 0 is rounding.
    """
    shared = min(len(ours), len(theirs)) // steps * steps
    if not shared:
        return None
    sides = [torch.stack([loss.reshape(()).double().cpu() for loss in side[:shared]]) for side in (ours, theirs)]
    a, b = (side.reshape(-1, steps).mean(dim=1) for side in sides)
    floor = 1e-3 * torch.nan_to_num(b.abs(), 0.0, 0.0).max()
    difference = (a - b).abs() / torch.maximum(torch.maximum(a.abs(), b.abs()), floor)
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, torch.nan_to_num(difference, math.inf, math.inf)).max())


# -- statistics


def rows(
    ours: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]], size: int, paired: bool
) -> list[Compared]:
    """A row for each phase that ran on either side, and "step" for all of it.

    Args:
        ours, baseline: seconds by phase, of each window of `size` steps.
        paired: window i of both sides ran side by side.
    """
    sides = [[_by_name(window, size) for window in side] for side in (ours, baseline)]
    made = []
    for name in (*PHASES, "step"):
        columns = [[window.get(name, 0.0) for window in side] for side in sides]
        if any(any(column) for column in columns):
            made.append(row(name, columns[0], columns[1], paired))
    return made


def _by_name(window: Mapping[str, float], size: int) -> dict[str, float]:
    named = {name: seconds / size for name, seconds in window.items()}
    return {**named, "step": sum(named.values())}


def row(name: str, ours: Sequence[float], baseline: Sequence[float], paired: bool) -> Compared:
    """Medians over windows, and the ratio with its interval.

    Example:
        >>> made = row("step", [2.0, 2.2, 2.1, 2.0, 2.1], [1.0, 1.1, 1.0, 1.0, 1.1], paired=True)
        >>> made.ratio, made.low <= made.ratio <= made.high
        (2.0, True)
    """
    made = Compared(name, median(baseline), median(ours), baseline_windows=list(baseline), ours_windows=list(ours))
    if min(baseline) > 0.0:
        made.ratio, made.low, made.high = bootstrap(ours, baseline, paired)
    return made


def bootstrap(ours: Sequence[float], baseline: Sequence[float], paired: bool) -> tuple[float, float, float]:
    """The ratio, and the 95 % percentile interval of it over resampled windows (Efron's bootstrap; seed 0).

    Paired: the median of the pairs' ratios. Otherwise: the ratio of the medians, each side resampled by itself.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(values: Tensor) -> Tensor:
        index = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
        return values[index].quantile(0.5, dim=1)

    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(baseline, dtype=torch.float64)
    if paired:
        ratio, ratios = float((a / b).quantile(0.5)), drawn(a / b)
    else:
        ratio, ratios = float(a.quantile(0.5) / b.quantile(0.5)), drawn(a) / drawn(b)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ratio, low, high
