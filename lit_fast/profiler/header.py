"""What ran, where, and with what: the header of a profile. Cheap: it starts no process and imports nothing heavy."""

from __future__ import annotations

import inspect
import os
import platform
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from lit_fast.profiler import one_run
from lit_fast.profiler.record import Header
from lit_fast.profiler.throughput import compute_dtype, get_available_flops

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

SHOWN = 8  # tensors of a batch
MOST_WRAPPERS = 64  # of a function: what is wrapped in more is wrapped in itself


def begin(header: Header, trainer: Trainer) -> None:
    """What is known as a run begins."""
    import lit_fast

    script = sys.argv[0] if sys.argv else ""
    strategy, device, module = trainer.strategy, trainer.config.device, trainer._module
    header.script, header.commit = script, _commit(script)
    header.host, header.pid = socket.gethostname(), os.getpid()
    header.rank, header.local_rank = strategy.global_rank, strategy.local_rank
    header.world_size, header.run = strategy.world_size, one_run.name_of(strategy)
    header.processor, header.cores = processor(), len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 0
    header.versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lit_fast": lit_fast.__version__,
    }
    header.device = str(device.type)
    if device.type == "cuda":
        header.device = torch.cuda.get_device_name(device)
        header.driver = driver()
        header.versions["cuda"] = str(torch.version.cuda)
        peak = get_available_flops(device, compute_dtype(str(trainer.precision)))
        if peak is not None:
            header.peak_flops, header.peak_source = float(peak), "the vendor's data sheet (profiler/throughput.py)"
    if "triton" in sys.modules:
        header.versions["triton"] = str(getattr(sys.modules["triton"], "__version__", ""))
    header.module = type(module).__name__ if module is not None else ""
    header.precision, header.strategy = str(trainer.precision), type(strategy).__name__
    header.accumulate_grad_batches = trainer.accumulate_grad_batches


def complete(header: Header, trainer: Trainer, batch: Batch | None) -> None:
    """What is known once steps run: the model as it is trained, who steps it, the first batch."""
    module, plans = trainer._module, trainer.fit_loop.plans
    if batch is not None and not header.batch:
        header.batch, header.samples_per_step = batch.text, batch.samples
        # A language model of ours, or one that says as much of itself; its batches hold one token more than it learns.
        per_token = getattr(module, "flops_per_token", None)
        if batch.tokens is not None and callable(per_token):
            header.tokens_per_step = batch.tokens
            header.flops_per_step = float(batch.tokens * per_token())
    if module is not None and not header.parameters:
        header.parameters = sum(p.numel() for p in module.parameters() if not isinstance(p, _LAZY))
    if plans is not None and plans.module is module and not header.optimizer:
        adopted = plans.binding.stepping.adopted
        reasons = Counter(each.reason for each in adopted)
        header.optimizer = ", ".join(f"{n} x {reason}" if n > 1 else reason for reason, n in reasons.items())
    if trainer.fit_loop.loader is not None and not header.data:
        header.data, header.data_where, header.workers = source_of(trainer.fit_loop.loader)


def source_of(loader: Any) -> tuple[str, str | None, int | None]:
    """What a loader is; file:line of what the program itself does for a sample or a batch; workers. Never an error.

    Example:
        >>> source_of(DataLoader([1, 2, 3], num_workers=2))
        ('a DataLoader with 2 workers of list', None, 2)
    """
    parts = getattr(loader, "flattened", None)
    if isinstance(parts, list) and len(parts) == 1:
        loader = parts[0]
    elif isinstance(parts, list) and parts:
        return f"{len(parts)} loaders", next(filter(None, (source_of(each)[1] for each in parts)), None), None
    if not isinstance(loader, DataLoader):
        return type(loader).__name__, _own(type(loader), "__iter__", "__getitem__"), None
    dataset = loader.dataset
    while isinstance(inner := getattr(dataset, "dataset", None), Dataset):  # a Subset, and wrappers like it
        dataset = inner
    collate = where(loader.collate_fn) if callable(loader.collate_fn) else ""
    place = _own(type(dataset), "__getitems__", "__getitem__", "__iter__") or (collate if _is_own(collate) else None)
    workers = loader.num_workers
    with_workers = f" with {workers} worker{'' if workers == 1 else 's'}" if workers else ""
    return f"a {type(loader).__name__}{with_workers} of {type(dataset).__name__}", place, workers


def _own(kind: type, *methods: str) -> str | None:
    """Where the first of those methods is defined that a program, and no package, defines for that class."""
    places = (where(getattr(kind, method)) for method in methods if hasattr(kind, method))
    return next(filter(_is_own, places), None)


def _is_own(place: str) -> bool:
    return bool(place) and not place.startswith("<") and "site-packages" not in place


_LAZY = torch.nn.parameter.UninitializedParameter
_HAS_AFFINITY = hasattr(os, "sched_getaffinity")


@dataclass
class Batch:
    """What is kept of the first batch."""

    text: str  # shapes and dtypes
    samples: float | None
    tokens: float | None = None  # predicted ones, where it is rows of token numbers

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Of tensors, also nested ones, in lists and mappings; of anything else its type.

        Example:
            >>> Batch.of([torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)])
            Batch(text='float32[4, 8], int64[4]', samples=4.0, tokens=None)
        """
        tensors = list(_tensors(batch))
        shown = [f"{str(t.dtype).removeprefix('torch.')}{_shape(t)}" for t in tensors[:SHOWN]]
        if len(tensors) > SHOWN:
            shown.append(f"and {len(tensors) - SHOWN} more")
        first = tensors[0] if tensors else None
        samples = float(first.size(0)) if first is not None and first.dim() else None
        rows = (
            isinstance(batch, torch.Tensor) and batch.dtype == torch.int64 and batch.dim() == 2 and not batch.is_nested
        )
        tokens = float(batch.shape[0] * (batch.shape[1] - 1)) if rows else None
        return cls(", ".join(shown) or type(batch).__name__, samples, tokens)


def _shape(tensor: torch.Tensor) -> str:
    return " nested" if tensor.is_nested else str(list(tensor.shape))


def _tensors(batch: Any, depth: int = 0) -> Iterable[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping) and depth < 4:
        for item in batch.values():
            yield from _tensors(item, depth + 1)
    elif isinstance(batch, list | tuple) and depth < 4:
        for item in batch:
            yield from _tensors(item, depth + 1)


def where(function: Callable[..., Any]) -> str:
    """file:line of what is called in the end; "" where it has none (built-in, or compiled).

    Example:
        >>> where(where).rpartition(":")[0].endswith("header.py")
        True
    """
    for _ in range(MOST_WRAPPERS):
        if isinstance(function, partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            break
    else:
        return ""
    try:
        code = inspect.unwrap(getattr(function, "__func__", function)).__code__
    except (AttributeError, ValueError):  # it has none; its wrappers are a ring
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


def _commit(script: str) -> str | None:
    try:
        return commit_of(Path(script).resolve().parent) or commit_of(Path.cwd())
    except OSError:  # the folder that the program runs in is gone
        return None


def commit_of(folder: Path) -> str | None:
    """What is checked out in the repository around `folder`, read from its files; None where there is none."""
    try:
        for parent in (folder, *folder.parents):
            git = parent / ".git"
            if git.is_file():  # a work tree beside the repository's own
                git = (parent / git.read_text().partition("gitdir:")[2].strip()).resolve()
            if git.is_dir():
                return _head(git)
    except (OSError, UnicodeDecodeError):
        pass
    return None


def _head(git: Path) -> str | None:
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head[:10] or None
    name = head.partition("ref:")[2].strip()
    common = git / "commondir"
    folders = [git, *([(git / common.read_text().strip()).resolve()] if common.is_file() else [])]
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).read_text().strip()[:10]
        packed = folder / "packed-refs"
        if packed.is_file():
            found = re.search(rf"^([0-9a-f]+) {re.escape(name)}$", packed.read_text(), re.MULTILINE)
            if found:
                return found[1][:10]
    return None


def processor() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        return version_of(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None


def version_of(text: str) -> str | None:
    """Its version, as the module itself says it, the closed or the open one.

    Example:
        >>> version_of("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024")
        '550.54.15'
        >>> version_of("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build")
        '570.86.15'
    """
    found = re.search(r"Module(?: for \S+)?\s+([\d.]+)", text)
    return found[1] if found else None
