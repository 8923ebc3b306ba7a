"""Logged values: what `self.log` keeps, how it is reduced, and under which names it appears.

A hook logs into the table of that hook; the table hands out one slot per name. The slot is made at the first call,
where every rule is checked; later calls compare their options with the slot's and store one number. On the CPU a
tensor is read at once (0.2 us), so that changing it in place afterwards cannot change what was logged; on another
device a copy is queued on the current stream, and nobody waits for it until a person reads the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import HOOKS, LogRule

Number = float | Tensor  # a Python float (CPU values) or a 0-dim tensor on a device

_REDUCTIONS = ("mean", "sum", "min", "max")


def _scalar(value: Any, name: str) -> Number:
    """Take a snapshot of one logged value; an error names the metric when it is not a single number."""
    if isinstance(value, Tensor):
        if value.is_cpu:
            try:
                number: float = value.item()
                return number
            except RuntimeError:
                pass
        elif value.numel() == 1:
            copy: Tensor = value.detach().reshape(()).clone()
            return copy if copy.is_floating_point() else copy.to(torch.get_default_dtype())
        raise ValueError(
            f"self.log({name!r}, ...) was given a tensor of shape {tuple(value.shape)}; a single number is needed: "
            f"log a reduction of it, such as value.mean()."
        )
    if isinstance(value, bool | int | float):
        return float(value)
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # numpy scalars, without importing numpy
        return float(value.item())
    raise ValueError(
        f"self.log({name!r}, ...) was given {type(value).__name__}; allowed are a number, a 0-dim tensor, or a "
        f"torchmetrics Metric. Use self.log_dict for a dictionary."
    )


def batch_size_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor found in it (1 where there is none).

    Raises:
        MisconfigurationException: the batch holds neither a tensor nor a string to take a size from.
    """
    for tensor in _tensors(batch):
        return tensor.shape[0] if tensor.dim() else 1
    raise MisconfigurationException(
        f"The batch size of a {type(batch).__name__} could not be found for the mean over the epoch; "
        f"pass it: self.log(..., batch_size=n)."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, str):
        yield torch.empty(len(batch), 0)
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from _tensors(item)
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from _tensors(item)
    elif hasattr(batch, "__dataclass_fields__"):
        for field in batch.__dataclass_fields__:
            yield from _tensors(getattr(batch, field))


class Slot:
    """One logged name of one hook. `write` keeps the newest value; subclasses also reduce over the epoch."""

    __slots__ = (
        "dtype", "fresh", "loader", "log", "name", "newest", "on_epoch", "on_step", "options", "prog_bar", "reduction",
        "restored", "settled", "suffix",
    )  # fmt: skip

    def __init__(
        self, name: str, options: tuple[Any, ...], log: MetricLog, on_step: bool, on_epoch: bool, reduction: str
    ) -> None:
        self.name, self.options, self.log = name, options, log
        self.on_step, self.on_epoch, self.reduction = on_step, on_epoch, reduction
        self.prog_bar: bool = options[0]
        self.suffix = self.loader = ""  # which validation loader: in its name, and at all
        self.dtype = torch.float32
        self.fresh = self.restored = self.settled = False
        self.newest: Any = None

    def write(self, value: Any, batch_size: int | None) -> None:
        if value.__class__ is Tensor and value.is_cpu and not value.dim():  # the common case, one call less
            self.newest = value.item()
        else:
            self.newest = _scalar(value, self.name)
        self.fresh = True

    def step_value(self) -> Any:
        return self.newest

    def epoch_value(self) -> Any:
        return self.newest

    def reset(self) -> None:
        self.fresh = self.settled = False
        self.newest = None


class MeanSlot(Slot):
    """Mean over the epoch, weighted by the number of samples in each batch; sums are float64 on the CPU."""

    __slots__ = ("total", "weight")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.total: Any = 0.0
        self.weight = 0

    def write(self, value: Any, batch_size: int | None) -> None:
        number = _scalar(value, self.name)
        weight = self.log.batch_size() if batch_size is None else batch_size
        self.newest = number
        self.total = self.total + number * weight
        self.weight += weight
        self.fresh = True

    def epoch_value(self) -> Any:
        return self.total / self.weight if self.weight else math.nan

    def reset(self) -> None:
        super().reset()
        self.total, self.weight = 0.0, 0


class ReduceSlot(Slot):
    """Sum, minimum or maximum over the epoch."""

    __slots__ = ("reduce", "state")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reduce: Callable[[Any, Any], Any] = {"sum": _add, "min": _minimum, "max": _maximum}[self.reduction]
        self.state: Any = None

    def write(self, value: Any, batch_size: int | None) -> None:
        self.newest = _scalar(value, self.name)
        self.state = self.newest if self.state is None else self.reduce(self.state, self.newest)
        self.fresh = True

    def epoch_value(self) -> Any:
        return self.state

    def reset(self) -> None:
        super().reset()
        self.state = None


class MetricSlot(Slot):
    """A torchmetrics object: its own state is the reduction; it is reset with the epoch."""

    __slots__ = ("metric",)

    def write(self, value: Any, batch_size: int | None) -> None:
        self.metric = value
        self.newest = getattr(value, "_forward_cache", None)
        self.fresh = True

    def epoch_value(self) -> Any:
        computed = self.metric.compute()
        return computed.detach() if isinstance(computed, Tensor) else computed

    def reset(self) -> None:
        super().reset()
        self.metric.reset()


def _add(a: Any, b: Any) -> Any:
    return a + b


def _minimum(a: Any, b: Any) -> Any:
    return torch.minimum(a, b) if isinstance(b, Tensor) else (b if b < a or b != b else a)


def _maximum(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(b, Tensor) else (b if b > a or b != b else a)


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
        self.sanity_checking = False  # then the values of several loaders are not published, as in Lightning
        self.epoch_end = False  # reading gives epoch values (True) or the newest step's
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
            size = batch_size_of(self.batch)
            self._sizes = (self.batch, size)
        return size

    def declare(self, table: Table, name: str, value: Any, options: tuple[Any, ...]) -> Slot:
        """Check one `self.log` call against every rule and make its slot. Called once per name and hook.

        Raises:
            MisconfigurationException: the hook does not log, logs only per epoch, or was called before with
                other options for this name.
        """
        _, _, on_step, on_epoch, reduce_fx, add_dataloader_idx = options
        if table.rule is None:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called inside `{table.hook}`, where nothing can be logged; call it in "
                f"a step or in an epoch hook, or write to the logger itself: self.logger.experiment."
            )
        known = table.slots.get(name)
        if known is not None and known.restored:  # from a checkpoint, where a reduction stands by its name
            known.restored = False
            if known.options == (*options[:4], _reduction(reduce_fx, name), add_dataloader_idx):
                known.options = options
                return known
        if known is not None:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called twice in `{table.hook}` with different options: first "
                f"{_spelled(known.options)}, now {_spelled(options)}. Use one set of options, or another name."
            )
        if "/dataloader_idx_" in name and add_dataloader_idx:
            raise MisconfigurationException(
                f"self.log({name!r}, ...): the loader's index is added to the name already; "
                f"leave it out, or pass add_dataloader_idx=False."
            )
        on_step = table.rule.on_step if on_step is None else on_step
        on_epoch = table.rule.on_epoch if on_epoch is None else on_epoch
        if on_step and not table.rule.step_allowed:
            raise MisconfigurationException(
                f"self.log({name!r}, on_step=True) is not possible inside `{table.hook}`, which runs once an epoch; "
                f"leave on_step out."
            )
        if not on_step and not on_epoch:
            raise MisconfigurationException(
                f"self.log({name!r}, on_step=False, on_epoch=False) inside `{table.hook}` would log nothing; leave one "
                f"of them out."
            )
        reduction = _reduction(reduce_fx, name)
        make = _slot_class(on_epoch, reduction)
        if hasattr(value, "compute") and hasattr(value, "update") and hasattr(value, "reset"):
            make = MetricSlot
        slot = make(name, options, self, on_step, on_epoch, reduction)
        slot.loader = table.suffix
        slot.suffix = table.suffix if add_dataloader_idx else ""
        self.evaluates_steps = self.evaluates_steps or (on_step and self.stage != "train")
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            slot.dtype = torch.float64
        table.slots[name] = slot
        return slot

    # -- reading

    def slots(self, stage: str | None = None) -> list[Slot]:
        """The slots that hold a value, oldest table first. Safe to call from another thread."""
        tables = list(self._stages.get(stage or self.stage, {}).values())
        return [slot for table in tables for slot in list(table.slots.values()) if slot.fresh]

    def collect(self, suffix: str | None = None, settle: bool = False) -> dict[str, Any]:
        """Bring the three published dictionaries up to date; returns what the loggers should get now.

        Args:
            suffix: only of this loader, where there are several.
            settle: these values are final: whatever happens to a metric object afterwards does not change them.
        """
        training = self.stage == "train"
        logged: dict[str, Any] = {}
        for slot in self.slots():
            if not (slot.on_epoch if self.epoch_end else slot.on_step) or suffix not in (None, slot.loader):
                continue
            if slot.settled and self.epoch_end:
                continue
            slot.settled = settle
            if slot.loader and self.sanity_checking:
                continue
            value = _rounded(slot.epoch_value(), slot.dtype) if self.epoch_end else slot.step_value()
            if value is None:
                continue
            name = slot.name + slot.suffix
            forked = slot.on_step and slot.on_epoch
            fork = slot.name + (("_epoch" if self.epoch_end else "_step") if forked else "") + slot.suffix
            if slot.options[1] is not False:
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
                self._prog_bar[fork] = slot.step_value()
        return {name: to_float(value) for name, value in list(self._prog_bar.items()) if value is not None}

    def rest(self) -> None:
        """No hook runs any more: nothing can be logged, and no batch is kept alive."""
        self.current = self.batch = None
        self._sizes = (None, 0)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The running training epoch's values and what callbacks saw last; torchmetrics keep their own state."""
        slots = [
            {
                "hook": table.hook, "suffix": table.suffix, "name": slot.name, "dtype": slot.dtype,
                "options": (*slot.options[:4], slot.reduction, slot.options[5]),
                "on_step": slot.on_step, "on_epoch": slot.on_epoch, "reduction": slot.reduction,
                "values": {key: getattr(slot, key) for key in _VALUES if hasattr(slot, key)},
            }
            for table in self._stages.get("train", {}).values()
            for slot in table.slots.values()
            if slot.fresh and not isinstance(slot, MetricSlot)
        ]  # fmt: skip
        return {"slots": slots, "callback": dict(_published(self._callback, self._callback_tensors))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the epoch that `state` was taken in."""
        for saved in state["slots"]:
            table = self.table(saved["hook"] + saved["suffix"], "train")
            make = _slot_class(saved["on_epoch"], saved["reduction"])
            slot = make(saved["name"], saved["options"], self, saved["on_step"], saved["on_epoch"], saved["reduction"])
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


def to_float(value: Any) -> float:
    """A logged value as a Python float; waits for the device where the value is still there."""
    return float(value.item() if isinstance(value, Tensor) else value)


def _published(pending: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, (value, dtype) in pending.items():
        tensors[name] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
    pending.clear()
    return tensors


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """An epoch's value in the precision that callbacks see it in, so that a log file agrees with them."""
    return torch.tensor(value, dtype=dtype).item() if isinstance(value, float) else value


_VALUES = ("newest", "total", "weight", "state")  # what a slot gathers, by kind


def _slot_class(on_epoch: bool, reduction: str) -> type[Slot]:
    if not on_epoch:
        return Slot
    return MeanSlot if reduction == "mean" else ReduceSlot


def _reduction(reduce_fx: Any, name: str) -> str:
    reduction = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    reduction = {"amin": "min", "amax": "max", "avg": "mean"}.get(reduction, reduction)
    if reduction not in _REDUCTIONS:
        raise MisconfigurationException(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}): allowed are {', '.join(_REDUCTIONS)}; for anything else "
            f"log a torchmetrics Metric."
        )
    return reduction


def _spelled(options: tuple[Any, ...]) -> str:
    names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "add_dataloader_idx")
    return ", ".join(f"{name}={value!r}" for name, value in zip(names, options, strict=True))
