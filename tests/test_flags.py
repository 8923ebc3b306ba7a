"""What `deterministic`, `benchmark` and `detect_anomaly` set in torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from heart_models import Plain, batches, fitted, trainer


@pytest.fixture(autouse=True)
def flags_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def flags() -> tuple[bool, bool, bool, str | None]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"deterministic": True}, (True, False, False, ":4096:8")),
        ({"deterministic": "warn"}, (True, True, False, ":4096:8")),
        ({"deterministic": False}, (False, False, False, None)),
        ({"benchmark": True}, (False, False, True, None)),
        ({"deterministic": False, "benchmark": True}, (False, False, True, None)),
    ],
)
def test_torch_is_told(options: dict[str, Any], expected: tuple[bool, bool, bool, str | None]) -> None:
    torch.backends.cudnn.benchmark = False
    trainer(**options)
    assert flags() == expected


def test_none_leaves_what_the_program_set() -> None:
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    trainer()
    assert flags() == (True, False, True, None)


def test_deterministic_switches_benchmarking_off() -> None:
    torch.backends.cudnn.benchmark = True
    trainer(deterministic=True)
    assert not torch.backends.cudnn.benchmark
    with pytest.warns(UserWarning, match="deterministic=True, benchmark=True.*drop benchmark=True"):
        trainer(deterministic=True, benchmark=True)
    assert torch.backends.cudnn.benchmark


def test_anomalies_are_looked_for_during_the_fit_alone() -> None:
    seen = []

    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(torch.is_anomaly_enabled())
            loss = self.loss(batch)
            return torch.sqrt(loss * 0 - 1) if batch_idx == 1 else loss

    fitted(Breaks(), batches(2), max_epochs=1)
    assert seen == [False, False]
    with pytest.raises(RuntimeError, match=r"SqrtBackward0.*nan"), pytest.warns(UserWarning, match="Error detected"):
        fitted(Breaks(), batches(2), max_epochs=1, detect_anomaly=True)
    assert seen[2:] == [True, True] and not torch.is_anomaly_enabled()
