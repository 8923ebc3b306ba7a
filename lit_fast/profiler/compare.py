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
from collections.abc import Iterator, Sequence
from functools import wraps
from itertools import islice
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
from lit_fast.profiler.ratios import rows
from lit_fast.profiler.record import Comparison, Finding, Header, Profile, Report
from lit_fast.profiler.step import StepProfiler
from lit_fast.profiler.windows import FEWEST, WINDOWS, Borders, a_step, seconds

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

# Largest relative difference of losses. Both sides do the same arithmetic but for the last bit of a root (torch's
# loops, optim/adopted.py). In 64 and 32 bits the first steps agree to that bit, and a fault shows there: each one is
# compared. From then on training carries it further, exponentially where it is chaotic (two networks against each
# other: from 1e-7 in the first hundred steps to 1e-3 after 700), and in 16 bits at once, since the bit moves roundings
# by 2^-8 of a value in bfloat16. Single steps differ then, means do not: the means of windows are compared.
FIRST_LOSSES, LOSS_BOUND, LOSS_BOUND_OF_MEANS = 64, 1e-5, 2e-2


class Alternation(Borders):
    """Both sides' windows. Our side is the `fit` that this clock is the profiler of; the other one runs at its borders.

    Args:
        trainer: of our side.
        other: makes the other side, at the first border.
        size: micro-batches of a window.
        windows: pairs, one to warm up included.
    """

    marks_device = False  # only our side would pay for it

    def __init__(self, trainer: Trainer, other: Any, size: int, windows: int) -> None:
        super().__init__()
        self.trainer, self.make, self.size, self.windows = trainer, other, size, windows
        self.device = trainer.config.device
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
            self.ours.append(a_step(self.began, seconds(self, self.device), self.size))
        done = len(self.ours)
        with_ours = rng.capture()
        while len(self.theirs) < self._due(done):
            self._run_other()
        rng.restore(with_ours)
        if done == self.windows:
            self.trainer.should_stop = True
            return 1  # the loop looks only after a step
        self.began = seconds(self, self.device)
        return self.size

    def _due(self, done: int) -> int:
        """Windows that the other side has run when ours begins its next one: it begins the pairs 0, 2, 4, ..."""
        return min(done + 1 - done % 2, self.windows)

    def _run_other(self) -> None:
        rng.restore(self.random)
        if self.other is None:
            self.other = self.make()
            self.other.clock.start()
        began = seconds(self.other.clock, self.device)
        deque(islice(self.other.steps, self.size), maxlen=0)
        self.theirs.append(a_step(began, seconds(self.other.clock, self.device), self.size))
        self.random = rng.capture()


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
                f"or wrapped one: compile what it holds (self.net = torch.compile(self.net)), or profile without a "
                f"comparison (--against none)."
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
            shorter = pairs * size // 2 // self.trainer.accumulate_grad_batches
            less = f", or take fewer steps a window: --steps {shorter}" if shorter > FEWEST else ""
            raise ProfileError(
                f"The fit ended after {pairs} windows of {size} micro-batches; at least {FEWEST + 1} are needed for an "
                f"interval. Train longer (max_steps, max_epochs){less}."
            )
        notes = self.notes
        odd = sum(1 for loss in losses if not bool(loss.isfinite().all()))
        if odd:
            notes = [*notes, f"{odd} of {len(losses)} losses are not finite: nothing was learned in those steps"]
        every = self.trainer.accumulate_grad_batches
        if every > 1:
            notes = [*notes, f"a step is a micro-batch; the optimizer takes one in {every}"]
        difference, bound = differ(losses, their_losses, size, few_bits="16" in self.trainer.precision)
        comparison = Comparison(
            "eager",
            rows=rows(turns.ours[1:pairs], turns.theirs[1:pairs], paired=True),
            windows=pairs - 1,
            steps=size,
            largest_loss_difference=difference,
            loss_bound=bound,
            notes=notes,
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


def differ(ours: Sequence[Tensor], theirs: Sequence[Tensor], window: int, few_bits: bool) -> tuple[float | None, float]:
    """The largest difference of the losses of both sides, and what is allowed: of the first ones, or where those agree
    and later ones do not, of the means of windows.
    """
    first = largest_difference(ours[:FIRST_LOSSES], theirs[:FIRST_LOSSES])
    means = largest_difference(ours, theirs, window)
    agree = first is None or first <= LOSS_BOUND
    if few_bits or (agree and means is not None and means > LOSS_BOUND_OF_MEANS):
        return means, LOSS_BOUND_OF_MEANS
    return first, LOSS_BOUND


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


# -- other baselines: not side by side, so each side is resampled by itself

ONE_AFTER_THE_OTHER = (
    "both were measured one after the other, not side by side: the interval knows nothing of what changed between them"
)


def against_lightning(report: Report, found: dict[str, Any], size: int) -> Comparison:
    """The recorded fit against what `lightning_side.py` found, in windows of as many steps.

    Raises:
        ProfileError: one of them is too short.
    """
    notes = [ONE_AFTER_THE_OTHER, f"Lightning's side: {_listed(found['versions'])}"]
    return _one_after_the_other("lightning", report.profiles[0].windows, found["windows"], size, notes)


def against_report(report: Report, earlier: Report | Profile, path: str, size: int) -> Comparison:
    """The recorded fit against that of an earlier report.

    Raises:
        ProfileError: it was not made by `lit-fast profile`, or is too short.
    """
    before = earlier.profiles[0] if isinstance(earlier, Report) else earlier
    if not before.windows:
        raise ProfileError(
            f"{path} holds no windows of steps to compare with: `lit-fast profile script.py --out DIR` writes a "
            f"report.json that does."
        )
    notes = [ONE_AFTER_THE_OTHER, *differences(report.profiles[0].header, before.header)]
    return _one_after_the_other(path, report.profiles[0].windows, before.windows, size, notes)


def _one_after_the_other(
    against: str, ours: list[dict[str, float]], baseline: list[dict[str, float]], size: int, notes: list[str]
) -> Comparison:
    for windows, whose in ((ours, "this fit"), (baseline, against)):
        if len(windows) <= FEWEST:
            raise ProfileError(
                f"There are {len(windows)} windows of {whose}; at least {FEWEST + 1} are needed for an interval. Train "
                f"longer, or record fewer steps: --steps N."
            )
    made = rows(ours[1:], baseline[1:], paired=False)
    return Comparison(against, made, windows=min(len(ours), len(baseline)) - 1, steps=size, notes=notes)


def differences(ours: Header, before: Header) -> list[str]:
    """What is not the same in two runs, so that their times may differ for it."""
    said = []
    for name in ("host", "processor", "cores", "device", "driver", "world_size", "module", "parameters", "precision",
                 "strategy", "optimizer", "batch", "script", "commit"):  # fmt: skip
        a, b = getattr(before, name), getattr(ours, name)
        if a != b:
            said.append(f"{name.replace('_', ' ')}: {a} then, {b} now")
    for name in sorted({*before.versions, *ours.versions}):
        if before.versions.get(name) != ours.versions.get(name):
            said.append(f"{name}: {before.versions.get(name)} then, {ours.versions.get(name)} now")
    return said


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def differing_losses(comparison: Comparison | None) -> list[Finding]:
    """A finding where both sides did not train the same: their times then mean nothing."""
    if comparison is None or comparison.largest_loss_difference is None or comparison.loss_bound is None:
        return []
    if comparison.largest_loss_difference <= comparison.loss_bound:
        return []
    return [
        Finding(
            "The losses of both sides differ",
            f"By {comparison.largest_loss_difference:.3g} of a loss, where {comparison.loss_bound:g} is allowed: they "
            f"do not train the same, so their times cannot be compared.",
            "Look for what the module does only under a Trainer, for data that is drawn anew by each reader, and for "
            "state that copies share; eager.py in the report's folder is the loop by hand.",
        )
    ]
