"""What lies in memory over one step: parameters, gradients, optimizer state, activations, each storage counted once.

Activations are, on a CPU, what autograd has saved for backward and has not let go of; on CUDA what the allocator holds
beyond parameters, gradients, optimizer state and buffers, so temporary tensors too. Which line saved most is known on
both. Tensors that a checkpointed part keeps for its repetition are not seen by autograd's hooks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_fast.profiler.record import Memory, MemorySample
from lit_fast.profiler.syncs import line_of_caller

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "other")


class _Saved:
    """A tensor that autograd keeps, for as long as it does."""

    __slots__ = ("key", "owner", "tensor")

    def __init__(self, tensor: Tensor, owner: StepMemory) -> None:
        self.key: int | None = None
        self.tensor, self.owner = tensor, owner
        self.key = owner.hold(tensor)

    def __del__(self) -> None:
        self.owner.let_go(self.key)


class StepMemory:
    """Samples memory by category during one step, from where it is entered to where it is left.

    Args:
        module: whose parameters, gradients and buffers are counted.
        optimizers: whose state is counted.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> with StepMemory(model, [], torch.device("cpu")) as step:
        ...     loss = model(torch.ones(4, 100)).square().sum()
        ...     step.sample("forward")
        ...     loss.backward()
        ...     step.sample("backward")
        >>> [(sample.point, sample.parameters, sample.gradients) for sample in step.memory().over_step]
        [('forward', 4040, 0), ('backward', 4040, 4040)]
    """

    def __init__(
        self, module: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], device: torch.device
    ) -> None:
        self.module, self.optimizers, self.device = module, list(optimizers), device
        self._held: dict[int, list[int]] = {}  # storage: [bytes, how often autograd has saved it]
        self._excluded: set[int | None] = set()
        self.live = self.most = 0  # bytes that autograd holds now, and at most held
        self._by_line: dict[str, int] = {}  # bytes that a line saved
        self._samples: list[MemorySample] = []
        self._began = time.perf_counter()
        self._hooks: Any = None

    def __enter__(self) -> StepMemory:
        self._excluded = {_key(t) for t in (*self.module.parameters(), *self.module.buffers())} - {None}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        self._disable = torch.autograd.graph.disable_saved_tensors_hooks
        torch.autograd.graph.disable_saved_tensors_hooks = self._stepping_aside(threading.get_ident())  # type: ignore[assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        torch.autograd.graph.disable_saved_tensors_hooks = self._disable
        self._hooks.__exit__(*exc)

    def _stepping_aside(self, thread: int) -> Callable[[str], AbstractContextManager[None]]:
        """What torch.func asks for, to whom hooks are an error: ours go for as long."""
        disable, aside = self._disable, False

        @contextmanager
        def without_ours(message: str) -> Iterator[None]:
            nonlocal aside
            if aside or threading.get_ident() != thread:
                with disable(message):
                    yield
                return
            aside = True
            self._hooks.__exit__()
            try:
                with disable(message):
                    yield
            finally:
                self._hooks.__enter__()
                aside = False

        return without_ours

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def hold(self, tensor: Tensor) -> int | None:
        key = _key(tensor)
        if key is None or key in self._excluded:
            return None
        held = self._held.setdefault(key, [_nbytes(tensor), 0])
        held[1] += 1
        if held[1] == 1:
            self.live += held[0]
            self.most = max(self.most, self.live)
            where, line = line_of_caller()
            shown = f"{where}: {line}" if line else where
            self._by_line[shown] = self._by_line.get(shown, 0) + held[0]
        return key

    def let_go(self, key: int | None) -> None:
        held = None if key is None else self._held.get(key)
        if held is None or key is None:
            return
        held[1] -= 1
        if held[1] == 0:
            self.live -= held[0]
            del self._held[key]  # its address may be another storage's soon

    def sample(self, point: str) -> None:
        """What lies in memory now, under the name of a point of the step."""
        parameters = list(self.module.parameters())
        state = (t for o in self.optimizers for entry in o.state.values() for t in _tensors(entry))
        groups: dict[str, Iterable[Tensor | None]] = {
            "parameters": parameters,
            "gradients": (p.grad for p in parameters),
            "optimizer": state,
            "other": self.module.buffers(),
        }
        seen: set[int] = set()
        sizes = {name: self._sum(tensors, seen) for name, tensors in groups.items()}
        if self.device.type == "cuda":
            sizes["activations"] = max(0, torch.cuda.memory_allocated(self.device) - sum(sizes.values()))
        else:
            sizes["activations"] = sum(size for key, (size, _) in self._held.items() if key not in seen)
        self._samples.append(MemorySample(time.perf_counter() - self._began, point, **sizes))

    def _sum(self, tensors: Iterable[Tensor | None], seen: set[int]) -> int:
        total = 0
        for tensor in tensors:
            if tensor is None or tensor.device.type != self.device.type:
                continue
            key = _key(tensor)
            if key is not None and key not in seen:
                seen.add(key)
                total += _nbytes(tensor)
        return total

    def memory(self) -> Memory:
        """The samples, the most that was in use, and who had the largest part of it then."""
        found = Memory(over_step=list(self._samples), host_resident=_resident())
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            found.peak = int(stats.get("allocated_bytes.all.peak", 0))
            found.reserved = int(stats.get("reserved_bytes.all.current", 0))
            found.allocator_retries = int(stats.get("num_alloc_retries", 0))
        if not self._samples:
            return found
        largest = max(self._samples, key=_total)
        if found.peak is None:
            found.peak = _total(largest)
        category = max(CATEGORIES, key=lambda name: int(getattr(largest, name)))
        share = getattr(largest, category) / max(1, _total(largest))
        found.peak_owner = f"{category} ({share:.0%} after {largest.point})"
        if category == "activations" and self._by_line:
            line, size = max(self._by_line.items(), key=lambda item: item[1])
            found.peak_owner += f", most saved at {line} ({size / 1e6:.1f} MB)"
        return found


def _total(sample: MemorySample) -> int:
    return sum(int(getattr(sample, name)) for name in CATEGORIES)


def _tensors(entry: Any) -> Iterator[Tensor]:
    for value in entry.values() if isinstance(entry, dict) else ():
        if isinstance(value, Tensor):
            yield value


def _key(tensor: Tensor) -> int | None:
    """Its storage's address; None where it has none, or nothing in it."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without a storage
        return None


def _nbytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def _resident() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)
