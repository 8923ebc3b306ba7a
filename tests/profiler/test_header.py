"""The header of a profile: what a batch, a function, a folder may be, and no run ends for it."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted

from lit_fast.profiler import DeepProfiler, StepProfiler, header
from lit_fast.profiler.report import terminal


def test_a_nested_batch_has_no_shape_but_a_size() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
    assert header.Batch.of([nested]) == header.Batch("float32 nested", 2.0)
    of_tokens = torch.nested.nested_tensor([torch.ones(3, dtype=torch.int64)])
    assert header.Batch.of(of_tokens) == header.Batch("int64 nested", 1.0)


def test_a_function_that_is_wrapped_in_itself_has_no_place() -> None:
    def hook() -> None: ...

    line = header.where(hook)
    assert line.startswith(__file__) and header.where(functools.wraps(hook)(lambda: None)) == line
    hook.__wrapped__ = hook  # type: ignore[attr-defined]
    assert header.where(hook) == ""
    assert header.where(len) == header.where(dict) == ""


def test_a_program_whose_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, gone = batches(12), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError):
        os.getcwd()
    for profiler in (StepProfiler(show=False), DeepProfiler(skip=1, window=1)):
        made = fitted(Plain(), data, max_epochs=1, profiler=profiler, default_root_dir=str(tmp_path))
        assert made.global_step == 12 and made.profiler.profile().header.commit is None


class Awkward(Plain):
    """What it tells of itself wants an argument."""

    def flops_per_token(self, wanted: int) -> int:
        return wanted

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batches(1)[0], batch_idx)


def test_a_module_that_cannot_be_described_is_trained() -> None:
    with pytest.warns(RuntimeWarning, match="header is not complete: TypeError: .*flops_per_token"):
        made = fitted(
            Awkward(), [torch.ones(2, 3, dtype=torch.int64)] * 3, max_epochs=1, profiler=StepProfiler(show=False)
        )
    assert made.global_step == 3 and made.profiler.profile().steps.count == 3


def test_a_batch_that_cannot_be_described_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header.Batch, "of", lambda _: {}["x"])
    with pytest.warns(RuntimeWarning, match="does not know its batch: KeyError: 'x'"):
        made = fitted(Plain(), batches(3), max_epochs=1, profiler=StepProfiler(show=False))
    assert made.global_step == 3 and made.profiler.profile().header.batch == "Tensor"


def test_a_table_that_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(terminal, "print_report", broken)
    with pytest.warns(RuntimeWarning, match="could not be shown: BrokenPipeError: nobody reads"):
        made = fitted(Plain(), batches(2), max_epochs=1, profiler="step")
    assert made.global_step == 2 and made.profiler.profile().finished


def test_a_file_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, show=False)
    monkeypatch.setattr(profiler, "profile", lambda: 1 / 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = fitted(Plain(), batches(2), max_epochs=1, profiler=profiler)
    assert made.global_step == 2
    assert ["ZeroDivisionError" in str(w.message) for w in caught if "could not be written" in str(w.message)] == [True]
