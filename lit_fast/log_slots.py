"""What one logged name of one hook keeps: the newest value, and its reduction over the epoch and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException
from lit_fast.log_rules import KEPT, Options, refuse

if TYPE_CHECKING:
    from lit_fast.metrics import MetricLog


def _scalar(value: Any, name: str) -> float | Tensor:
    """Take a snapshot of one logged value; an error names the metric when it is not a single number."""
    if isinstance(value, Tensor):
        if value.is_cpu:
            try:
                number: float = value.item()
                return number
            except RuntimeError:
                pass
        elif value.numel() == 1:
            copy: Tensor = value.detach().reshape(())
            return copy.clone() if copy.dtype in KEPT else copy.to(torch.float32)
        raise ValueError(
            f"self.log({name!r}, ...) was given a tensor of shape {tuple(value.shape)}; a single number is needed: "
            f"log a reduction of it, such as value.mean()."
        )
    refuse(value, name)
    return float(value.item() if hasattr(value, "item") else value)


class Slot:
    """One logged name of one hook. `write` keeps the newest value; subclasses also reduce over the epoch."""

    __slots__ = (
        "dtype", "fresh", "loader", "log", "meant", "name", "newest", "on_epoch", "on_step", "options", "prog_bar",
        "reduction", "restored", "settled", "shared", "suffix",
    )  # fmt: skip
    is_metric = False

    def __init__(self, name: str, meant: Options, log: MetricLog) -> None:
        self.name, self.meant, self.log = name, meant, log
        self.options: tuple[Any, ...] = ()  # as the newest call gave them; `meant` has every default filled in
        self.on_step, self.on_epoch = bool(meant.on_step), bool(meant.on_epoch)
        self.reduction: str = meant.reduce_fx
        self.prog_bar = meant.prog_bar
        self.suffix = self.loader = ""  # which validation loader: in its name, and at all
        self.dtype = torch.float32
        self.fresh = self.restored = self.settled = False
        self.newest: Any = None
        self.shared: tuple[Any, bool, Any] | None = None  # of all processes: (version, of the epoch?, value)

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
        self.newest = self.shared = None

    # -- several processes: see log_sync.py

    @property
    def syncs(self) -> bool:
        return self.meant.sync_dist and not self.meant.rank_zero_only

    def version(self) -> Any:
        """Another one after every write."""
        return self.newest

    def is_shared(self, epoch: bool) -> bool:
        """Whether `shared` holds the value of all processes since the last write."""
        return self.shared is not None and self.shared[1] == epoch and self._still(self.shared[0])

    def _still(self, version: Any) -> bool:
        return version is self.newest

    def sent(self, epoch: bool) -> tuple[Any, ...]:
        """This process's part of the value."""
        return (self.newest,)

    def merged(self, parts: Tensor, epoch: bool) -> Tensor:
        """The value of all processes from their parts, shape (processes, how many each sent), float64."""
        return _OVER_PROCESSES[self.reduction](parts[:, 0])

    def describe(self) -> str:
        return self.reduction


class MeanSlot(Slot):
    """Mean over the epoch, weighted by the number of samples in each batch; sums are float64 on the CPU."""

    __slots__ = ("total", "weight")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.total: Any = 0.0
        self.weight = 0

    def write(self, value: Any, batch_size: int | None) -> None:
        if value.__class__ is Tensor and value.is_cpu and not value.dim():  # as in Slot.write
            number: float | Tensor = value.item()
        else:
            number = _scalar(value, self.name)
        weight = self.log.batch_size() if batch_size is None else batch_size
        self.newest = number
        self.total = self.total + number * weight
        self.weight += weight
        self.fresh = True

    def epoch_value(self) -> Any:
        return self.total / self.weight if self.weight else math.nan

    def sent(self, epoch: bool) -> tuple[Any, ...]:
        return (self.total, self.weight) if epoch else (self.newest,)

    def merged(self, parts: Tensor, epoch: bool) -> Tensor:
        return parts[:, 0].sum() / parts[:, 1].sum() if epoch else parts[:, 0].mean()

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

    def sent(self, epoch: bool) -> tuple[Any, ...]:
        return (self.state if epoch else self.newest,)

    def reset(self) -> None:
        super().reset()
        self.state = None


class MetricSlot(Slot):
    """A torchmetrics object: its own state is the reduction; it is reset with the epoch."""

    __slots__ = ("metric",)
    is_metric = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.metric: Any = None

    def write(self, value: Any, batch_size: int | None) -> None:
        if value is not self.metric:
            if self.metric is not None:
                raise MisconfigurationException(
                    f"self.log({self.name!r}, ...) was given two different metrics or values in one hook; "
                    f"give each a name of its own."
                )
            self.metric = value
        self.newest = self._single(value._forward_cache) if self.on_step else None
        self.fresh = True

    def epoch_value(self) -> Any:
        return self._single(self.metric.compute())

    @property
    def syncs(self) -> bool:
        return True  # `compute` asks the other processes by itself

    def version(self) -> Any:
        return self.metric._update_count

    def _still(self, version: Any) -> bool:
        return bool(version == self.metric._update_count)

    def sent(self, epoch: bool) -> tuple[Any, ...]:
        return ()

    def describe(self) -> str:
        return type(self.metric).__name__

    def _single(self, value: Any) -> Tensor | None:
        if isinstance(value, Tensor):
            return value if self.meant.enable_graph else value.detach()
        if value is None:  # updated without being called: there is no value of this step
            return None
        raise ValueError(
            f"{type(self.metric).__name__}, logged as {self.name!r}, gives {type(value).__name__}; only metrics that "
            f"give one tensor can be logged: log its parts by names of their own."
        )

    def reset(self) -> None:
        super().reset()
        self.metric.reset()


_OVER_PROCESSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": Tensor.mean, "sum": Tensor.sum, "min": Tensor.amin, "max": Tensor.amax
}  # fmt: skip


def _add(a: Any, b: Any) -> Any:
    return a + b


def _minimum(a: Any, b: Any) -> Any:
    return torch.minimum(a, b) if isinstance(b, Tensor) else (b if b < a or b != b else a)


def _maximum(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(b, Tensor) else (b if b > a or b != b else a)


def slot_class(meant: Options) -> type[Slot]:
    if not meant.on_epoch:
        return Slot
    return MeanSlot if meant.reduce_fx == "mean" else ReduceSlot
