"""A stand-in for the CUDA kernels that does their work on the CPU: what the host does around them can be seen."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_fast import ops
from lit_fast.optim import nonfinite, scaling


class StandIn:
    """`_core.Stepper` whose `step_on_cuda` is the CPU's step."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.check_parameters, self.step, self.step_if_finite = core.check_parameters, core.step, core.step_if_finite

    def step_on_cuda(self, groups: Any, state: Any, scale: float, max_norm: float, clip_value: float, cuda: Any) -> Any:
        _, _, norm, workspace, factor, skipped, for_good, _, told = cuda
        assert callable(workspace) and (norm is not None or (skipped is None and max_norm < 0.0))
        scale *= 1.0 if factor is None else factor.item()
        if skipped is None:
            return self._core.step(groups, state, scale, max_norm, clip_value)
        if for_good and skipped.item():
            skipped += 1
            return None
        if told and max_norm < 0.0:
            assert factor is not None
            skipped += int(factor.isnan())
            return None if factor.isnan() else self._core.step(groups, state, scale, max_norm, clip_value)
        found = self._core.step_if_finite(groups, state, scale, max_norm, clip_value)
        if isinstance(found, str):
            return found
        norm.fill_(found)
        skipped += int(not norm.isfinite())
        return None


class Event:
    """Of a device that is never done by itself."""

    done = False

    def query(self) -> bool:
        return Event.done

    def record(self, stream: object) -> None: ...


def gradient_norm(groups: Any, scale: float, max_norm: float, clip_value: float, rewrite: bool, cuda: Any) -> Any:
    _, _, norm, _, factor, *_ = cuda
    scale *= 1.0 if factor is None else factor.item()
    found = CPU_NORM(groups, scale, max_norm, clip_value, rewrite, None)
    if isinstance(found, str):
        return found
    if norm is not None:
        norm.fill_(found)
    return None


CPU_NORM = ops._core.gradient_norm


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    core_stepper, zeros = ops.core_stepper, torch.zeros

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return zeros(*size, **options)

    monkeypatch.setattr(ops, "core_stepper", lambda mapping: StandIn(core_stepper(mapping)))
    monkeypatch.setattr(ops._core, "gradient_norm", gradient_norm)
    for module in (ops, nonfinite, scaling):
        monkeypatch.setattr(module, "kernels_for", lambda device: ("CUDA", "this build has CUDA kernels"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(device_index=0, cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "zeros", unpinned)
    monkeypatch.setattr(Event, "done", False)


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on whatever would make the host wait for a device is an error."""

    def waits(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host would wait for the device")

    for name in "item cpu tolist numpy nonzero __bool__ __float__ __int__ __index__ equal".split():
        monkeypatch.setattr(torch.Tensor, name, waits)
    monkeypatch.setattr(torch.cuda, "synchronize", waits)
