"""Files of one run among those of others: by name, by number, and by the time."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from profiles import profile

from lit_fast.profiler.one_run import Stamp, name_of, newest
from lit_fast.profiler.record import Profile

NOW = datetime.fromisoformat("2026-11-20T09:30:00+00:00")


def of(began: float, took: float, world_size: int = 4, run: str | None = "host:1", **header: Any) -> Profile:
    made = profile(world_size=world_size)
    made.header.started, made.wall = (NOW + timedelta(seconds=began)).isoformat(), took
    made.header.run = run
    for name, value in header.items():
        setattr(made.header, name, value)
    return made


def kept(*profiles: Profile) -> list[int]:
    """Of those, which are of the run that began last."""
    paths = {Path(str(number)): Stamp.of(one) for number, one in enumerate(profiles)}
    of_run, others = newest(paths)
    assert sorted([*of_run, *others]) == sorted(paths)
    return sorted(int(path.name) for path in of_run)


@pytest.mark.parametrize(
    "earlier",
    [
        of(-50, 40, world_size=8),  # the larger one that was run before
        of(-50, 40, run="host:2"),
        of(-50, 40),  # of the same name: the port is always the same
        of(-1, 40, run=None),  # another program's, or an earlier release's
        of(-1, 40, script="other.py"),
    ],
)
def test_an_earlier_run_is_told_apart(earlier: Profile) -> None:
    assert kept(earlier, of(0, 100), of(-1, 101)) == [1, 2]


def test_processes_of_one_run_begin_and_end_at_different_times() -> None:
    assert kept(of(0, 100), of(-30, 500), of(-5, 4)) == [0, 1, 2], "one that failed as the last one began, too"
    assert kept(of(0, 9), of(-40, 9, host="other")) == [0, 1], "clocks of two hosts differ"
    assert kept(of(0, 9, script="/a/train.py"), of(0, 9, script="train.py")) == [0, 1]


def test_a_time_that_nobody_noted() -> None:
    assert kept(Profile(), Profile()) == [0, 1]
    assert "a program in 1 processes, begun once" in str(Stamp.of(Profile()))


def test_the_name_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "LSB_JOBID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    strategy: Any = SimpleNamespace(
        world_size=2, cluster_environment=SimpleNamespace(main_address="node-0", main_port=29500)
    )
    assert name_of(strategy) == "node-0:29500"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert name_of(strategy) == "node-0:29500 SLURM_JOB_ID=77 SLURM_STEP_ID=1"
    strategy.world_size = 1
    assert name_of(strategy) is None
