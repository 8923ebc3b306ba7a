"""Long fits keep their size, and a run leaves nothing behind: no thread, file, module or batch."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import endurance_program
import pytest
import torch
from heart_models import Plain, batches, rows, trainer
from torch.utils.data import DataLoader, IterableDataset


@pytest.mark.filterwarnings("ignore")
def test_a_thousand_steps_keep_their_memory(tmp_path: Path) -> None:
    readings = endurance_program.fit(1000, tmp_path)["readings"]
    assert len(readings) == 10
    assert max(readings[2:]) <= readings[2] * 1.005


@pytest.mark.slow
def test_ten_thousand_steps_leave_nothing_behind(tmp_path: Path) -> None:
    program = [sys.executable, endurance_program.__file__, "10000", str(tmp_path)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    readings = result["readings"]
    assert len(readings) == 10
    assert max(readings[2:]) <= readings[2] * 1.005, readings  # from step 2,000 on
    assert result["threads"][0] == result["threads"][1]
    assert result["open_files"][0] == result["open_files"][1]
    for run in (result, result["exception"], result["interrupt"]):
        assert run["gone"] == {"trainer": True, "module": True}
        assert run["batches_gone"] and run["batches_held_by_the_trainer"] == 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from torch.randn(64, 8)


class Again:
    """An iterable without a length that makes its batches anew."""

    def __iter__(self) -> Iterator[Any]:
        return (torch.randn(4, 8) for _ in range(16))


DATA: dict[str, Any] = {
    "loader": lambda: DataLoader(rows(64), batch_size=4),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "iterable": Again,
    "workers": lambda: DataLoader(rows(64), batch_size=4, num_workers=1),
    "persistent_workers": lambda: DataLoader(rows(64), batch_size=4, num_workers=1, persistent_workers=True),
}


class Noting(Plain):
    """Keeps weak references to all batches; may end the run in the middle of an epoch."""

    def __init__(self, end: type[BaseException] | None) -> None:
        super().__init__()
        self.end = end
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(weakref.ref(batch[0] if isinstance(batch, list) else batch))
        self.log("loss", self.loss(batch), on_epoch=True)
        if self.end is not None and batch_idx == 9:
            raise self.end
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(weakref.ref(batch))
        self.log("val", self.loss(batch))


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt], ids=["whole", "exception", "interrupt"])
@pytest.mark.parametrize("data", DATA)
def test_a_run_leaves_nothing_behind(data: str, end: type[BaseException] | None, tmp_path: Path) -> None:
    threads, files = set(threading.enumerate()), Counter(endurance_program.open_files())
    module = Noting(end)
    made = trainer(max_epochs=2, default_root_dir=tmp_path)
    train: Any = DATA[data]()
    val = [batch.clone() for batch in batches(2)] if data == "loader" else Again()
    try:
        made.fit(module, train, val)
    except (RuntimeError, SystemExit):
        assert end is not None
    assert len(module.seen) >= 10
    own = {id(batch) for batch in val} if isinstance(val, list) else set()
    held = [reference() for reference in module.seen if reference() is not None and id(reference()) not in own]
    assert held == [], "a batch outlives the fit"
    alive = {"trainer": weakref.ref(made), "module": weakref.ref(module), "data": weakref.ref(train)}
    del made, module, train
    gc.collect()
    assert {name for name, reference in alive.items() if reference() is not None} == set()
    deadline = time.monotonic() + 10  # a queue that is closed lets its thread end a moment later
    # What an earlier test left may be closed meanwhile: only what is new is this run's.
    while new := {*(set(threading.enumerate()) - threads), *(Counter(endurance_program.open_files()) - files)}:
        assert time.monotonic() < deadline, new
        time.sleep(0.01)


def test_validate_holds_no_batch() -> None:
    module = Noting(None)
    trainer().validate(module, Again(), verbose=False)
    assert module.seen and all(reference() is None for reference in module.seen)
