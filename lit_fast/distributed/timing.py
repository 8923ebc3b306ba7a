"""What bucket sizes are chosen from (`tuning.py`), measured in the run: arrivals of gradients, and the link."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lit_fast.distributed.tuning import Link, fit_link, probe_sizes

SCRATCH = 64 << 20  # bytes of the largest probe, or an eighth of all gradients: activations' memory is free by then


class Arrivals:
    """When the gradient of each of `params` comes, in the backwards between `start` and `stop`.

    On a GPU a gradient has come when the GPU has computed it, not when the host has asked for it.
    """

    def __init__(self, params: Sequence[Parameter]) -> None:
        self._stamp: Callable[[], Any] = _cuda_event if params[0].is_cuda else time.perf_counter
        self._since: Callable[[Any, Any], float] = _cuda_seconds if params[0].is_cuda else _seconds
        self._backwards: list[dict[int, Any]] = []
        self._running: dict[int, Any] | None = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, index))  # type: ignore[no-untyped-call]
            for index, p in enumerate(params)
        ]

    def start(self) -> None:
        self._running = {}

    def stop(self) -> None:
        self._backwards.append(self._running or {})
        self._running = None

    @property
    def count(self) -> int:
        """Of backwards that are over."""
        return len(self._backwards)

    def order(self) -> list[int]:
        """In which they came in the last backward."""
        return list(self._backwards[-1])

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _arrived(self, index: int, _: Tensor) -> None:
        if self._running is not None:
            self._running[index] = self._stamp()

    def seconds(self) -> dict[int, float]:
        """From the first gradient of a backward to each, the median of all backwards but the first, which finds nothing
        in caches; not for those that none came for. Waits for a GPU.
        """
        if self._stamp is _cuda_event:
            torch.cuda.synchronize()
        found: dict[int, list[float]] = {}
        for stamps in filter(None, self._backwards[1:]):
            first = next(iter(stamps.values()))
            for index, stamp in stamps.items():
                found.setdefault(index, []).append(self._since(first, stamp))
        return {index: statistics.median(times) for index, times in found.items()}


def _cuda_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _cuda_seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(begin.elapsed_time(end)) / 1e3


def _seconds(begin: float, end: float) -> float:
    return end - begin


def processor_moves_bytes(group: Any, device: torch.device) -> bool:
    """Whether a collective of tensors on `device` takes processor time from what computes there."""
    return device.type == "cpu" and "gloo" in dist.get_backend_config(group)


def measure_link(group: Any, dtype: torch.dtype, device: torch.device, total: int, repeats: int = 5) -> Link:
    """What an all-reduce of up to `total` bytes takes in `group`; every process of it calls this, after a backward.

    The first of a size, which may set up what the others find, does not count.
    """
    sizes = probe_sizes(min(total, max(SCRATCH, total // 8)))
    scratch = torch.zeros(-(-sizes[-1] // dtype.itemsize), dtype=dtype, device=device)
    samples: list[tuple[int, float]] = []
    for nbytes in sizes:
        part = scratch[: -(-nbytes // dtype.itemsize)]
        for number in range(1 + repeats):
            begin = time.perf_counter()
            dist.all_reduce(part, group=group)
            if part.is_cuda:
                torch.cuda.synchronize(device)
            if number:
                samples.append((nbytes, time.perf_counter() - begin))
    return fit_link(samples)
