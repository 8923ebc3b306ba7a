"""Reads of values by the host, with their lines; CUDA's warnings are raised by hand, no GPU being there."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from lit_fast.profiler.syncs import Syncs

CPU = torch.device("cpu")


def line_number(of: Any, text: str) -> int:
    lines, first = inspect.getsourcelines(of)
    return first + next(n for n, line in enumerate(lines) if text in line)


def reads(x: torch.Tensor) -> None:
    for _ in range(3):
        x.sum().item()  # hidden
    if (x > 0).any():
        x[x > 0]
    torch.nonzero(x)
    x.add(1).mul(2)[0]


def test_every_read_has_its_line() -> None:
    with Syncs(CPU) as syncs:
        reads(torch.ones(4))
    found = {sync.line: sync for sync in syncs.found()}
    assert set(found) == {"x.sum().item()  # hidden", "if (x > 0).any():", "x[x > 0]", "torch.nonzero(x)"}
    hidden = found["x.sum().item()  # hidden"]
    assert hidden.calls == 3 and hidden.seconds is not None and 0 < hidden.seconds < 1
    assert hidden.where == f"tests/profiler/test_syncs.py:{line_number(reads, '# hidden')}" or hidden.where.endswith(
        f"/test_syncs.py:{line_number(reads, '# hidden')}"
    )


def test_a_hook_in_backward_is_found() -> None:
    x = torch.ones(4, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: print(end="" if grad.norm() < 9 else "large"))
    with Syncs(CPU) as syncs:
        y.sum().backward()
    (sync,) = syncs.found()
    assert sync.line.startswith("y.register_hook(lambda grad:") and sync.calls == 1


def test_values_are_untouched_and_nothing_stays_behind() -> None:
    with Syncs(CPU) as syncs:
        assert torch.arange(5).sum().item() == 10
    torch.ones(3).sum().item()
    assert [sync.calls for sync in syncs.found()] == [1]


def test_what_cuda_warns_of_is_counted_and_other_warnings_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with Syncs(torch.device("cuda")) as syncs:
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            torch.ones(2).sum().item()  # lies on the host: nobody waits
    (sync,) = syncs.found()
    assert sync.calls == 2 and sync.seconds is None and sync.line.startswith("warnings.warn(")
    assert modes == ["warn", 0] and [str(w.message) for w in shown] == ["something else"]
