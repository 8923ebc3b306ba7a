"""Logged values: what `self.log` keeps, how it is reduced, and under which names it appears.

A hook logs into the table of that hook; the table hands out one slot per name. The slot is made at the first call,
where every rule is checked; later calls compare their options with the slot's and store one number. On the CPU a
tensor is read at once (0.2 us), so that changing it in place afterwards cannot change what was logged; on another
device a copy is queued on the current stream, and nobody waits for it until a person reads the number.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException, PossibleUserWarning
from lit_fast.hooks import HOOKS, LogRule
from lit_fast.log_rules import (
    Options,
    batch_size_of,
    dtype_of,
    is_metric,
    meant_by,
    metrics_in,
    refuse,
    spelled,
    takes_iterator,
)
from lit_fast.log_slots import MetricSlot, Slot, slot_class
from lit_fast.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lit_fast.log_sync import LogSync
    from lit_fast.strategies.strategy import Strategy


class Table:
    """The slots of one hook (and, with several loaders, of one loader)."""

    __slots__ = ("hook", "rule", "slots", "suffix")

    def __init__(self, hook: str, rule: LogRule | None, suffix: str) -> None:
        self.hook, self.rule, self.suffix = hook, rule, suffix
        self.slots: dict[str, Slot] = {}


class MetricLog:
    """All that one run logged: tables by stage ("train", "validate", ...) and hook, and the values last seen.

    The step writes `current` (which table `self.log` fills) and `batch`; everything else happens at the first call
    of a name, at a logging step, or when somebody reads.
    """

    def __init__(self) -> None:
        self.current: Table | None = None
        self.batch: Any = None
        self.stage = "train"
        self.evaluates_steps = False  # does anything log single batches of validation or test data?
        self.shares_evaluation_steps = False  # ... with sync_dist?
        self.sanity_checking = False  # then the values of several loaders are not published, as in Lightning
        self.epoch_end = False  # reading gives epoch values (True) or the newest step's
        self.sync: LogSync | None = None  # where there are several processes
        self._advised: set[str] = set()
        self._stages: dict[str, dict[str, Table]] = {}
        self._sizes: tuple[Any, int] = (None, 0)
        self._callback: dict[str, Any] = {}  # (value, dtype) since somebody last read them
        self._callback_tensors: dict[str, Tensor] = {}
        self._logged: dict[str, Any] = {}
        self._logged_tensors: dict[str, Tensor] = {}
        self._prog_bar: dict[str, Any] = {}

    # -- writing

    def table(self, hook: str, stage: str | None = None, suffix: str = "") -> Table:
        """The table that `self.log` fills while `hook` runs; made at the first call, kept for the whole run."""
        tables = self._stages.setdefault(stage or self.stage, {})
        key = hook + suffix
        if key not in tables:
            row = HOOKS.get(hook)
            tables[key] = Table(hook, row.log if row else None, suffix)
        return tables[key]

    def batch_size(self) -> int:
        """Samples in the running batch, found once per batch."""
        if self.batch is None:
            return 1
        batch, size = self._sizes
        if batch is not self.batch:
            batch = self.batch
            size = batch.shape[0] if batch.__class__ is Tensor and batch.dim() else batch_size_of(batch)
            self._sizes = (batch, size)
        return size

    def declare(
        self, table: Table, name: str, value: Any, options: tuple[Any, ...], module: Any, batch_size: int | None
    ) -> Slot:
        """Check one `self.log` call against every rule and make its slot.

        Called once per name and hook, and again where a call says the same in other words.

        Raises:
            MisconfigurationException: the hook does not log, logs only per epoch, or was called before with
                other options for this name; the metric is no attribute of the module.
            ValueError: the value is of a kind that cannot be logged.
        """
        refuse(value, name)
        meant = meant_by(Options(*options), table.rule, table.hook, name, value, module)
        if self.sync is None:
            meant = meant.in_one_process()
        if meant.on_step and meant.sync_dist and not meant.rank_zero_only and self.sync is not None:
            if self.stage == "train":
                self.sync.ask_for_steps()
            else:
                self.shares_evaluation_steps = True
        known = table.slots.get(name)
        if known is not None and known.restored and known.meant.in_one_process() == meant.in_one_process():
            known.meant = meant  # there may have been another number of processes
        if known is not None and known.meant == meant:
            known.options, known.restored = options, False
            return known
        if known is not None and not known.restored:  # one from a checkpoint may be of an older program
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called twice in `{table.hook}` with different options: first "
                f"{spelled(known.meant)}, now {spelled(meant)}. Use one set of options, or another name."
            )
        if table.suffix and not meant.add_dataloader_idx:
            self._check_other_loaders(table, name)
        if batch_size is None and self.stage == "train" and takes_iterator(module.training_step):
            raise MisconfigurationException(
                f"self.log({name!r}, ...) needs batch_size=n where training_step takes `dataloader_iter`: the batch is "
                f"not seen from outside."
            )
        if meant.logger and options[1] and module.logger is None:
            warnings.warn(
                f"self.log({name!r}, ..., logger=True) reaches nobody: this Trainer has no logger.", stacklevel=3
            )
        make = MetricSlot if is_metric(value) else slot_class(meant)
        slot = make(name, meant, self)
        slot.options = options
        slot.loader = table.suffix
        slot.suffix = table.suffix if meant.add_dataloader_idx else ""
        slot.dtype = dtype_of(value, name, table.hook)
        self.evaluates_steps = self.evaluates_steps or (slot.on_step and self.stage != "train")
        table.slots[name] = slot
        return slot

    def _check_other_loaders(self, table: Table, name: str) -> None:
        for other in self._stages[self.stage].values():
            if other.hook == table.hook and other is not table and name in other.slots:
                raise MisconfigurationException(
                    f"self.log({name!r}, add_dataloader_idx=False) was called for two loaders, whose values would mix; "
                    f"let the index be added, or put dataloader_idx into the name."
                )

    # -- reading

    def slots(self, stage: str | None = None) -> list[Slot]:
        """The slots that hold a value, oldest table first. Safe to call from another thread."""
        tables = list(self._stages.get(stage or self.stage, {}).values())
        return [slot for table in tables for slot in list(table.slots.values()) if slot.fresh]

    def share(self, suffix: str | None = None) -> None:
        """Make what is to be synchronized the values of all processes; all of them must come here."""
        if self.sync is not None:
            due = [slot for slot in self._due(suffix) if not slot.is_shared(self.epoch_end)]
            self.sync.share(due, self.epoch_end, f"{self.stage}{suffix or ''}")

    def share_step(self) -> None:
        """The same where a row is due, in case that any process synchronizes values of steps."""
        if self.sync is not None and self.sync.steps:
            self.share()

    def _due(self, suffix: str | None) -> Iterator[Slot]:
        for slot in self.slots():
            wanted = slot.on_epoch and not slot.settled if self.epoch_end else slot.on_step
            if wanted and suffix in (None, slot.loader):
                yield slot

    def _value(self, slot: Slot) -> Any:
        if self.sync is not None:
            if slot.shared is not None and slot.is_shared(self.epoch_end):
                return slot.shared[2]
            if slot.is_metric and self.epoch_end:
                return None  # whoever reads it would ask the other processes, which may not be here
            if self.epoch_end and not slot.syncs and not slot.meant.rank_zero_only:
                self._advise(slot)
        return slot.epoch_value() if self.epoch_end else slot.step_value()

    def _advise(self, slot: Slot) -> None:
        if slot.name not in self._advised:
            self._advised.add(slot.name)
            rank_zero_warn(
                f"The value of {slot.name!r} over the epoch is each process's own: loggers and checkpoints get that of "
                f"the first one. self.log({slot.name!r}, ..., sync_dist=True) makes it the value of all.",
                category=PossibleUserWarning,
            )

    def collect(self, suffix: str | None = None, settle: bool = False) -> dict[str, Any]:
        """Bring the three published dictionaries up to date; returns what the loggers should get now.

        Args:
            suffix: only of this loader, where there are several.
            settle: these values are final: whatever happens to a metric object afterwards does not change them.
        """
        training = self.stage == "train"
        logged: dict[str, Any] = {}
        for slot in self._due(suffix):
            slot.settled = settle
            if slot.loader and self.sanity_checking:
                continue
            value = _rounded(self._value(slot), slot.dtype)
            if value is None:
                continue
            name = slot.name + slot.suffix
            forked = slot.on_step and slot.on_epoch
            fork = slot.name + (("_epoch" if self.epoch_end else "_step") if forked else "") + slot.suffix
            if slot.meant.logger:
                logged[fork] = value
                self._logged[fork] = (value, slot.dtype)
            if training or self.epoch_end:
                self._callback[name] = self._callback[fork] = (value, slot.dtype)
            if slot.prog_bar:
                self._prog_bar[fork] = value
        return logged

    def end_epoch(self) -> None:
        """Forget the stage's epoch: what was published stays readable."""
        self.collect()
        for table in self._stages.get(self.stage, {}).values():
            for slot in table.slots.values():
                if slot.fresh:
                    slot.reset()

    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest values as tensors, in one dictionary that callbacks may also write to."""
        self.collect()
        return _published(self._callback, self._callback_tensors)

    def logged_metrics(self) -> dict[str, Tensor]:
        self.collect()
        return _published(self._logged, self._logged_tensors)

    def progress_bar_metrics(self) -> dict[str, float]:
        """Numbers for a person: reading a device value waits for it, here and nowhere else."""
        for slot in self.slots():
            if slot.prog_bar and slot.on_step and not self.epoch_end:
                fork = slot.name + ("_step" if slot.on_epoch else "") + slot.suffix
                self._prog_bar[fork] = _rounded(slot.step_value(), slot.dtype)
        return {name: to_float(value, name) for name, value in list(self._prog_bar.items()) if value is not None}

    def begin_run(self, stage: str, strategy: Strategy | None = None) -> None:
        """A new run: names may be logged with other options than before."""
        self.sync = None
        if strategy is not None and strategy.world_size > 1:
            from lit_fast.log_sync import LogSync

            self.sync = LogSync(strategy)
        self.drop_values()
        self._stages.clear()
        self.evaluates_steps = self.shares_evaluation_steps = False
        self.stage = stage

    def rest(self) -> None:
        """No hook runs any more: nothing can be logged, and no batch is kept alive."""
        self.current = self.batch = None
        self._sizes = (None, 0)

    # -- checkpoints

    def state_dict(self, module: Any) -> dict[str, Any]:
        """The running training epoch: its values, what callbacks saw last, and what the metrics in `module` gathered.

        Metrics that belong to the validation that runs now are left out: it is over when a run goes on from here.
        """
        train = [(table, slot) for table in self._stages.get("train", {}).values() for slot in table.slots.values()]
        slots = [
            {
                "hook": table.hook, "suffix": table.suffix, "name": slot.name, "dtype": slot.dtype,
                "meant": tuple(slot.meant.in_one_process()), "metric": isinstance(slot, MetricSlot),
                "values": {key: getattr(slot, key) for key in _VALUES if hasattr(slot, key)},
            }
            for table, slot in train
            if slot.fresh
        ]  # fmt: skip
        others = [slot for stage in self._stages if stage != "train" for slot in self.slots(stage)]
        passing = {id(slot.metric) for slot in others if isinstance(slot, MetricSlot)}
        metrics = {
            name: {"updates": metric._update_count, "state": dict(metric.metric_state)}
            for name, metric in metrics_in(module).items()
            if metric._update_count and id(metric) not in passing
        }
        callback = dict(_published(self._callback, self._callback_tensors))
        return {"slots": slots, "callback": callback, "metrics": metrics}

    def load_state_dict(self, state: dict[str, Any], module: Any) -> None:
        """Go on with the epoch that `state` was taken in."""
        metrics = metrics_in(module)
        for name, saved in state.get("metrics", {}).items():
            if name in metrics:
                metric = metrics[name]
                for key, value in saved["state"].items():
                    setattr(metric, key, _on(value, metric.device))
                metric._update_count, metric._computed = saved["updates"], None
        for saved in state["slots"]:
            if "meant" not in saved:  # written before metrics were saved
                continue
            table = self.table(saved["hook"] + saved["suffix"], "train")
            meant = Options(*saved["meant"])
            slot: Slot
            if saved["metric"]:
                if meant.metric_attribute not in metrics:
                    continue
                slot = MetricSlot(saved["name"], meant, self)
                slot.metric = metrics[meant.metric_attribute]
            else:
                slot = slot_class(meant)(saved["name"], meant, self)
            for key, value in saved["values"].items():
                setattr(slot, key, value)
            slot.dtype, slot.fresh, slot.restored = saved["dtype"], True, True
            table.slots[saved["name"]] = slot
        self._callback_tensors.update(state["callback"])

    def drop_values(self) -> None:
        """Forget everything that was logged (after the sanity check, or at the start of a run)."""
        for tables in self._stages.values():
            for table in tables.values():
                for slot in table.slots.values():
                    if slot.fresh:
                        slot.reset()
        for values in (self._callback, self._callback_tensors, self._logged, self._logged_tensors, self._prog_bar):
            values.clear()
        self.epoch_end = False


class MutedLog(MetricLog):
    """The log of `Trainer(barebones=True)`: no hook ever has a table, so nothing that is logged is kept."""

    @property
    def current(self) -> None:
        return None

    @current.setter
    def current(self, table: Table | None) -> None: ...


def to_float(value: Any, name: str = "") -> float:
    """A logged value as a Python float; waits for the device where the value is still there.

    Raises:
        ValueError: it is a tensor of several numbers, which only callbacks can be shown.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"The metric {name!r} has the shape {tuple(value.shape)}; loggers and progress bars show single numbers: "
            f"log it with logger=False and prog_bar=False, or log its parts."
        )
    return float(value.item() if isinstance(value, Tensor) else value)


def _published(pending: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, (value, dtype) in pending.items():
        tensors[name] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
    pending.clear()
    return tensors


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A number in the precision that callbacks see it in, so that a log file agrees with them."""
    return ctypes.c_float(value).value if isinstance(value, float) and dtype == torch.float32 else value


_VALUES = ("newest", "total", "weight", "state")  # what a slot gathers, by kind


def _on(state: Any, device: torch.device) -> Any:
    """A metric's state, one tensor or a list of them, on `device`."""
    return [item.to(device) for item in state] if isinstance(state, list) else state.to(device)
