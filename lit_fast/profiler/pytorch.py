"""`torch.profiler` around the steps of a run, with the actions and submodules by name in its trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerAction, ProfilerActivity, record_function

from lit_fast.errors import MisconfigurationException
from lit_fast.profiler.profiler import Profiler

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_DEVICE = "device" if hasattr(FunctionEventAvg, "device_time_total") else "cuda"  # the word of older torch
_SORT_KEYS: tuple[str, ...] = (
    "count",
    "cpu_time",
    "cpu_time_total",
    "cpu_memory_usage",
    "self_cpu_time_total",
    "self_cpu_memory_usage",
    *(f"{device}_{what}" for device in ("cuda", "device") for what in ("time", "time_total", "memory_usage")),
    *(f"self_{device}_{what}" for device in ("cuda", "device") for what in ("time_total", "memory_usage")),
)


class PyTorchProfiler(Profiler):
    """Operators, their times, and with a `dirpath` a trace that Chrome, Perfetto and TensorBoard show.

    Args:
        dirpath, filename: where the report and the traces go (see `Profiler`).
        group_by_input_shapes: a row of the table for each shape; needs `record_shapes=True`.
        emit_nvtx: mark operators and actions for Nsight (`nsys profile`) instead of recording them here.
        export_to_chrome: write a trace of each recording.
        row_limit: rows of the table; -1 for all.
        sort_by_key: a column to sort by, such as "cpu_time_total" or "cuda_memory_usage"; None: the total time.
        record_module_names: mark the forward of each submodule with its name.
        table_kwargs: more arguments of `torch.autograd.profiler_util.EventList.table`.
        **profiler_kwargs: arguments of `torch.profiler.profile`: schedule, activities, on_trace_ready, ... A schedule
            counts the steps of all stages; None records steps 3 to 5 of every five (`wait=1, warmup=1, active=3`),
            or all, where the run has fewer than five.

    Raises:
        MisconfigurationException: `sort_by_key` is no column, or `schedule` gives no `ProfilerAction`.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        if sort_by_key is not None and sort_by_key not in _SORT_KEYS:
            raise MisconfigurationException(
                f"PyTorchProfiler(sort_by_key={sort_by_key!r}) is no column; allowed: {', '.join(_SORT_KEYS)}."
            )
        self.schedule = profiler_kwargs.pop("schedule", None)
        if self.schedule is not None and not isinstance(self.schedule(0), ProfilerAction):
            raise MisconfigurationException(
                f"PyTorchProfiler(schedule=...) gave {self.schedule(0)!r} for step 0; it has to give a "
                f"torch.profiler.ProfilerAction, as torch.profiler.schedule(...) does."
            )
        self._group_by_input_shapes = group_by_input_shapes and bool(profiler_kwargs.get("record_shapes"))
        self._emit_nvtx = emit_nvtx
        self._export_to_chrome = export_to_chrome
        self._row_limit = row_limit
        self._record_module_names = record_module_names
        self._table_kwargs = table_kwargs or {}
        self._given_handler: Callable[[Any], Any] | None = profiler_kwargs.pop("on_trace_ready", None)
        self._profiler_kwargs = profiler_kwargs
        activities = profiler_kwargs.get("activities")
        on_device = ProfilerActivity.CUDA in activities if activities else torch.cuda.is_available()
        key = sort_by_key or f"{'cuda' if on_device else 'cpu'}_time_total"
        self._sort_by_key = key.replace("cuda", _DEVICE).replace("device", _DEVICE)
        self.profiler: torch.profiler.profile | None = None
        self.function_events: Any = None  # of the fullest recording, which the report shows
        self._entered: ExitStack | None = None
        self._marks: dict[str, AbstractContextManager[Any]] = {}
        self._last_action = ""

    def start(self, action_name: str) -> None:
        if self._entered is None:
            self._enter()
        if action_name not in self._marks:
            self._mark(action_name)

    def _mark(self, action_name: str) -> None:
        mark: Any = record_function(f"[pl][profile]{action_name}")
        mark.__enter__()
        self._marks[action_name] = mark

    def _close_marks(self) -> None:
        for mark in reversed(list(self._marks.values())):
            mark.__exit__(None, None, None)
        self._marks = {}

    def stop(self, action_name: str) -> None:
        mark = self._marks.pop(action_name, None)
        if mark is not None:
            mark.__exit__(None, None, None)
        if self.profiler is not None and action_name.endswith(STEPS):
            self._last_action = action_name
            around = list(self._marks)
            self._close_marks()  # an open mark points into torch's recording, which may end here: seen to crash
            self.profiler.step()
            for name in around:
                self._mark(name)

    def _enter(self) -> None:
        self._entered = ExitStack()
        if self._emit_nvtx:
            self._entered.enter_context(torch.cuda.profiler.profile())
            nvtx: Any = torch.autograd.profiler.emit_nvtx
            self._entered.enter_context(nvtx())
        else:
            made = torch.profiler.profile(
                schedule=self._schedule, on_trace_ready=self._on_trace_ready, **self._profiler_kwargs
            )
            self.profiler = self._entered.enter_context(made)
        if self._record_module_names and self._lightning_module is not None:
            self._entered.enter_context(_SubmoduleNames(self._lightning_module))

    def _schedule(self, step: int) -> ProfilerAction:
        if self.schedule is not None:
            return self.schedule(step)  # type: ignore[no-any-return]
        if self._has_few_steps():
            return ProfilerAction.RECORD
        by_default: Callable[[int], ProfilerAction] = torch.profiler.schedule(wait=1, warmup=1, active=3)
        return by_default(step)

    def _has_few_steps(self) -> bool:
        """Whether the run ends before the default schedule has recorded once; unknown before the data is."""
        trainer = None if self._lightning_module is None else self._lightning_module._trainer
        if trainer is None:
            return True  # used without a trainer: whatever runs is recorded
        if self._stage == "fit":
            epochs = 1 if trainer.max_epochs is None else max(1, trainer.max_epochs)
            steps = trainer.num_training_batches * epochs
            most = trainer.max_steps
            return bool(0 < (min(steps, most) if most > 0 else steps) < 5)
        return bool(0 < sum(getattr(trainer, f"num_{_DATA[self._stage or '']}_batches", ())) < 5)

    def _on_trace_ready(self, profile: torch.profiler.profile) -> None:
        recorded: Any = profile
        events = recorded.events()
        if len(events or ()) > len(self.function_events or ()):
            self.function_events = events
        if self._given_handler is not None:
            self._given_handler(profile)
        elif self._export_to_chrome and self.dirpath is not None:
            name = self._file_name(self._last_action)
            torch.profiler.tensorboard_trace_handler(str(self.dirpath), name)(profile)
        elif self._export_to_chrome:
            warnings.warn("PyTorchProfiler writes no trace: it has no folder. Pass dirpath.", stacklevel=2)

    def _leave(self) -> None:
        self._close_marks()
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.close()
        self.profiler = None

    def summary(self) -> str:
        self._leave()
        if not self.function_events:
            return ""
        averages = self.function_events.key_averages(group_by_input_shapes=self._group_by_input_shapes)
        table = averages.table(sort_by=self._sort_by_key, row_limit=self._row_limit, **self._table_kwargs)
        return self._sections({"operators, in the fullest recording": table})

    def teardown(self, stage: str | None) -> None:
        self._leave()
        self.function_events = None


_DATA = {"validate": "val", "test": "test", "predict": "predict"}


class _SubmoduleNames:
    """Marks the forward of every submodule with its name, while it is entered."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.marks: dict[str, list[AbstractContextManager[Any]]] = {}
        self.handles: list[Any] = []
        for name, child in self.module.named_modules():
            if name:
                label = f"[pl][module]{type(child).__module__}.{type(child).__name__}: {name}"
                self.handles.append(child.register_forward_pre_hook(self._begin(label)))
                self.handles.append(child.register_forward_hook(self._end(label), always_call=True))

    def _begin(self, label: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            mark: Any = record_function(label)
            mark.__enter__()
            self.marks.setdefault(label, []).append(mark)

        return begin

    def _end(self, label: str) -> Callable[..., None]:
        def end(*_: Any) -> None:
            if self.marks.get(label):
                self.marks[label].pop().__exit__(None, None, None)

        return end

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
