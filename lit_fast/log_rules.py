"""The rules of one `self.log` call: what may be logged, where, with which options, and what they mean there.

Everything here runs once per name and hook, except `batch_size_of`: once per batch whose mean is asked for.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_fast.errors import MisconfigurationException, PossibleUserWarning
from lit_fast.hooks import LogRule

KEPT = (torch.float32, torch.float64)  # dtypes in which a value stays as it is; all others become float32

_REDUCTIONS = {
    torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.max: "max", max: "max", torch.min: "min", min: "min"
}  # fmt: skip


class Options(NamedTuple):
    """The options of a `self.log` call that must be the same in each call of one name in one hook."""

    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: Any
    add_dataloader_idx: bool
    enable_graph: bool
    rank_zero_only: bool
    metric_attribute: str | None
    sync_dist: bool = False
    sync_dist_group: Any = None

    def in_one_process(self) -> Options:
        return self._replace(sync_dist=False, sync_dist_group=None)


def refuse(value: Any, name: str) -> None:
    """Raise for a value of a kind that cannot be logged at all.

    Raises:
        ValueError: neither a number, nor a tensor, nor a torchmetrics Metric.
    """
    if isinstance(value, Tensor | Number) or is_metric(value):
        return
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a numpy array, without importing numpy
        return
    collection = hasattr(value, "items")
    raise ValueError(
        f"self.log({name!r}, ...) was given {type(value).__name__}; allowed are a number, a tensor with one element, "
        f"or a torchmetrics Metric. {'Use self.log_dict for one level of names and values.' if collection else ''}"
    )


def is_metric(value: Any) -> bool:
    """Whether it is a torchmetrics Metric, which it can only be where torchmetrics has been imported."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def batch_size_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor found in it; a 0-dim tensor counts as 1.

    A warning says so where something else in the batch is of another size.

    Raises:
        MisconfigurationException: the batch holds no tensor to take a size from.
    """
    found: int | None = None
    for size in _sizes(batch):
        if found is None:
            found = size
        elif size != found:
            warnings.warn(
                f"The mean of a logged value over the epoch weighs this batch by {found}, the size of the first "
                f"tensor in it, but not everything in the batch is of that size; pass self.log(..., batch_size=n) "
                f"to be sure.",
                PossibleUserWarning,
                stacklevel=5,  # the caller of self.log
            )
            break
    if found is None:
        raise MisconfigurationException(
            f"The batch size of a {type(batch).__name__} could not be found for the mean over the epoch; "
            f"pass it: self.log(..., batch_size=n)."
        )
    return found


def _sizes(batch: Any) -> Iterator[int | None]:
    """The first dimension of every tensor in a batch, None for whatever is no tensor."""
    if isinstance(batch, Tensor):
        yield batch.shape[0] if batch.dim() else 1
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from _sizes(item)
    elif isinstance(batch, Iterable) and not isinstance(batch, str):
        for item in batch:
            yield from _sizes(item)
    elif hasattr(batch, "__dataclass_fields__"):
        for field in batch.__dataclass_fields__:
            yield from _sizes(getattr(batch, field))
    else:
        yield None


def meant_by(given: Options, rule: LogRule | None, hook: str, name: str, value: Any, module: Any) -> Options:
    """The options with every default of the hook filled in, checked against its rules."""
    if rule is None:
        raise MisconfigurationException(
            f"self.log({name!r}, ...) was called inside `{hook}`, where nothing can be logged; call it in "
            f"a step or in an epoch hook, or write to the logger itself: self.logger.experiment."
        )
    if "/dataloader_idx_" in name and given.add_dataloader_idx:
        raise MisconfigurationException(
            f"self.log({name!r}, ...): the loader's index is added to the name already; "
            f"leave it out, or pass add_dataloader_idx=False."
        )
    on_step = rule.on_step if given.on_step is None else bool(given.on_step)
    on_epoch = rule.on_epoch if given.on_epoch is None else bool(given.on_epoch)
    if on_step and not rule.step_allowed:
        raise MisconfigurationException(
            f"self.log({name!r}, on_step=True) is not possible inside `{hook}`, which runs once an epoch; "
            f"leave on_step out."
        )
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"self.log({name!r}, on_step=False, on_epoch=False) inside `{hook}` would log nothing; leave one "
            f"of them out."
        )
    attribute = given.metric_attribute
    if attribute is None and is_metric(value):
        attribute = attribute_of(value, name, module)
    return given._replace(
        logger=given.logger is not False,
        on_step=on_step,
        on_epoch=on_epoch,
        reduce_fx=_reduction(given.reduce_fx, name),
        metric_attribute=attribute,
    )


def _reduction(reduce_fx: Any, name: str) -> str:
    if isinstance(reduce_fx, str):
        reduction = "mean" if reduce_fx.lower() == "avg" else reduce_fx.lower()
        known = reduction in _REDUCTIONS.values()
    else:
        reduction = next((text for function, text in _REDUCTIONS.items() if function is reduce_fx), "")
        known = bool(reduction)
    if not known:
        raise MisconfigurationException(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}): allowed are 'mean', 'sum', 'min', 'max' and the functions "
            f"torch.mean, torch.sum, torch.min, torch.max; for anything else log a torchmetrics Metric."
        )
    return reduction


def dtype_of(value: Any, name: str, hook: str) -> torch.dtype:
    """The dtype that a value is published in: its own where that is float32 or float64, else the default one."""
    if isinstance(value, Tensor):
        if value.dtype in KEPT:
            return value.dtype
        if not value.is_floating_point():
            warnings.warn(
                f"self.log({name!r}, ...) in `{hook}` was given a tensor of {value.dtype}; it is logged as a "
                f"floating-point number. Convert it yourself to silence this.",
                PossibleUserWarning,
                stacklevel=4,
            )
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def metrics_in(module: Any) -> dict[str, Any]:
    """The torchmetrics objects among the submodules, by name."""
    return {name: child for name, child in module.named_modules() if is_metric(child)}


def attribute_of(metric: Any, name: str, module: Any) -> str:
    metrics = metrics_in(module)
    for attribute, candidate in metrics.items():
        if candidate is metric:
            return attribute
    raise MisconfigurationException(
        f"self.log({name!r}, ...) was given a {type(metric).__name__} that is no attribute of {type(module).__name__}, "
        f"so it would not move to the module's device; its metrics are {', '.join(metrics) or 'none'}. Set it as an "
        f"attribute (several in a torch.nn.ModuleList or ModuleDict), or pass metric_attribute='its name'."
    )


def takes_iterator(step: Callable[..., Any]) -> bool:
    try:
        return "dataloader_iter" in inspect.signature(step).parameters
    except (TypeError, ValueError):  # compiled or built-in: no signature to read
        return False


def spelled(options: Options) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options._asdict().items() if value is not None)
