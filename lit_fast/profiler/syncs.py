"""Where the host waits for the device, or reads what a tensor holds, with the line that caused it, during one step.

`.item()`, `float(loss)`, `if mask.any()` and `print(loss)` all end in one operation, `aten::_local_scalar_dense`; sizes
that depend on values (`nonzero`, a boolean index, `unique`) and copies from the device to the host wait as well. On a
CPU nothing waits, but the same line would on a GPU. On CUDA, torch's own sync debug mode tells of all others.
"""

from __future__ import annotations

import linecache
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lit_fast.profiler.record import Sync

_READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::equal",
}
_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}  # by a mask: its nonzero

_OURS = str(Path(__file__).parent.parent) + os.sep
_MODELS = tuple(os.path.join(_OURS, name) + os.sep for name in ("models", "demos"))  # what runs in a step as users' do
_TORCH = str(Path(torch.__file__).parent) + os.sep
_PYTHON = str(Path(os.__file__).parent) + os.sep
_PROFILER = str(Path(__file__).parent) + os.sep


def read_by_us() -> bool:
    """Whether what runs was called by this package itself, not by a model or a user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _PROFILER, "<")):
            return file.startswith(_OURS) and not file.startswith(_MODELS)
        frame = frame.f_back
    return False


def line_of_caller() -> tuple[str, str]:
    """("file:line", the source there) of the innermost line that is a user's.

    Where there is none between here and the step, as for what the loop itself does: the innermost line of this package.
    """
    frame: FrameType | None = sys._getframe(1)
    ours: FrameType | None = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and not file.startswith(_MODELS):
            if file.endswith(f"{os.sep}step.py") and os.path.dirname(file) + os.sep == _OURS:
                break  # what called the step is no cause
            if ours is None and not file.startswith(_PROFILER):
                ours = frame
        elif not file.startswith((_TORCH, "<")) and (not file.startswith(_PYTHON) or "-packages" in file):
            return _place(frame)
        frame = frame.f_back
    return ("", "") if ours is None else _place(ours)


def _place(frame: FrameType) -> tuple[str, str]:
    file, line = frame.f_code.co_filename, frame.f_lineno
    try:
        inside = file.startswith(os.getcwd() + os.sep)
    except OSError:  # the folder that the program runs in is gone
        inside = False
    return f"{os.path.relpath(file) if inside else file}:{line}", linecache.getline(file, line, frame.f_globals).strip()


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds every read of the device's values by the host that happens inside.

    Example:
        >>> loss = torch.ones(())
        >>> with Syncs(torch.device("cpu")) as syncs:
        ...     for _ in range(3):
        ...         _ = loss.item()
        >>> [(sync.calls, sync.seconds is not None) for sync in syncs.found()]
        [(3, True)]
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self._places: dict[str, Sync] = {}
        self._warned = 0
        self._in_operation = 0
        self._before: Any = None

    def __enter__(self) -> Syncs:
        if self.device.type == "cuda":
            self._before = (torch.cuda.get_sync_debug_mode(), warnings.catch_warnings())
            self._before[1].__enter__()
            warnings.filterwarnings("always", message=".*called a synchronizing CUDA operation.*")
            shown = warnings.showwarning

            def show(
                message: Warning | str,
                category: type[Warning],
                filename: str,
                lineno: int,
                file: TextIO | None = None,
                line: str | None = None,
            ) -> None:
                if "synchronizing CUDA operation" in str(message):
                    self._warned += 1
                    if not self._in_operation:
                        self._note(None)
                else:
                    shown(message, category, filename, lineno, file, line)

            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        if self._before is not None:
            mode, caught = self._before
            torch.cuda.set_sync_debug_mode(mode)
            caught.__exit__(*exc)
            self._before = None

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        warned = self._warned
        self._in_operation += 1
        begin = time.perf_counter()
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            took = time.perf_counter() - begin
            self._in_operation -= 1
        schema = getattr(func, "_schema", None)
        if schema is not None and (self._warned > warned or self._reads(schema.name, args, out)):
            self._note(took)
        return out

    def _reads(self, name: str, args: Any, out: Any) -> bool:
        if name in _READS:
            return any(isinstance(t, Tensor) and t.device.type == self.device.type for t in tree_iter(args))
        if name in _INDEXING:
            indices = args[1] if len(args) > 1 else ()
            return any(t.dtype in (torch.bool, torch.uint8) for t in tree_iter(indices) if isinstance(t, Tensor))
        if name in _COPIES and self.device.type != "cpu":
            source = args[1] if name == "aten::copy_" else args[0]
            to_host = isinstance(source, Tensor) and source.device.type == self.device.type and out.device.type == "cpu"
            return to_host and not out.is_pinned()  # into pinned memory a copy may go on by itself
        return False

    def _note(self, seconds: float | None) -> None:
        if self.device.type == "cpu" and read_by_us():  # a logged value: on a GPU it would be copied, not read
            return
        where, line = line_of_caller()
        place = self._places.setdefault(where, Sync(where, line, 0, None))
        place.calls += 1
        if seconds is not None:
            place.seconds = (place.seconds or 0.0) + seconds

    def found(self) -> list[Sync]:
        """By place, those that took longest first."""
        return sorted(self._places.values(), key=lambda sync: (-(sync.seconds or 0.0), -sync.calls))
