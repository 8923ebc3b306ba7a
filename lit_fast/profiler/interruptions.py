"""What stops a step inside whatever it does: the garbage collector, torch.compile."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lit_fast.ops import PhaseClock

COLLECTION, COMPILATION = "garbage collection", "compilation"
_COMPILER = "torch._dynamo.callback"  # of torch's: tells when it begins to compile, and when it has done so


def watch(clock: PhaseClock) -> ExitStack:
    """Tell `clock` of every interruption until what is returned is closed. Between two of them it costs nothing."""
    watched = ExitStack()
    collections = _Timed(clock, COLLECTION)

    def collection(phase: str, info: dict[str, int]) -> None:
        collections.begin() if phase == "start" else collections.end()

    gc.callbacks.append(collection)
    watched.callback(gc.callbacks.remove, collection)

    def compiler_is_there(module: ModuleType) -> None:
        compilations, compiler = _Timed(clock, COMPILATION), module.callback_handler
        compiler.register_start_callback(compilations.begin)
        compiler.register_end_callback(compilations.end)
        for remove, callback in (
            (compiler.remove_start_callback, compilations.begin),
            (compiler.remove_end_callback, compilations.end),
        ):
            watched.push(suppress(ValueError))  # torch.compiler.reset() has removed it
            watched.callback(remove, callback)

    if _COMPILER in sys.modules:
        compiler_is_there(sys.modules[_COMPILER])
    else:  # importing it takes seconds: most runs do without
        imports = _Import(_COMPILER, compiler_is_there)
        sys.meta_path.insert(0, imports)
        watched.callback(imports.forget)
    return watched


class _Timed:
    def __init__(self, clock: PhaseClock, kind: str) -> None:
        self.clock, self.kind, self.began = clock, kind, 0

    def begin(self, *_: Any) -> None:
        self.began = time.perf_counter_ns()

    def end(self, *_: Any) -> None:
        self.clock.interrupted(self.kind, time.perf_counter_ns() - self.began)


class _Import:
    """A finder for `sys.meta_path` that finds nothing, but tells when a module has been imported."""

    def __init__(self, name: str, imported: Callable[[ModuleType], None]) -> None:
        self.name, self.imported = name, imported

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.forget()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run, imported = spec.loader.exec_module, self.imported

            def exec_module(module: ModuleType) -> None:
                run(module)
                imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def forget(self) -> None:
        """It is not asked any more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
