"""The schema of profiles: histograms on a fixed grid, and files that come back as they were written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.errors import ProfileError
from lit_fast.profiler.files import read, write
from lit_fast.profiler.record import (
    SUBBUCKETS,
    Compared,
    Comparison,
    Device,
    Distribution,
    Finding,
    Header,
    Phase,
    Profile,
    Reading,
    Report,
    SlowStep,
    bucket_end,
    bucket_of,
)

durations = st.lists(st.floats(1e-9, 1e4), min_size=1, max_size=60)


@given(st.integers(0, 1 << 50))
def test_a_duration_lies_before_the_next_bucket_and_within_a_sixteenth(nanoseconds: int) -> None:
    index = bucket_of(nanoseconds)
    begin = bucket_end(index - 1) if index else 0
    assert begin <= nanoseconds < bucket_end(index)
    assert bucket_end(index) - begin <= max(1, begin / SUBBUCKETS)


@given(durations, st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_those_of_the_sorted_list(seconds: list[float], q: float) -> None:
    measured = Distribution()
    for duration in seconds:
        measured.add(duration)
    exact = sorted(seconds)[max(1, math.ceil(q * len(seconds))) - 1]
    assert abs(measured.quantile(q) - exact) <= exact / SUBBUCKETS + 2e-9


@given(durations, durations)
def test_merged_is_as_if_measured_together(one: list[float], other: list[float]) -> None:
    together, left, right = Distribution(), Distribution(), Distribution()
    for duration in one:
        left.add(duration)
        together.add(duration)
    for duration in other:
        right.add(duration)
        together.add(duration)
    left.merge(right)
    assert left.buckets == together.buckets and left.count == together.count
    assert (left.minimum, left.maximum) == (together.minimum, together.maximum)
    assert left.total == pytest.approx(together.total)


def test_an_empty_one_says_so() -> None:
    assert math.isnan(Distribution().quantile(0.5)) and math.isnan(Distribution().mean)


def some_profile() -> Profile:
    steps = Distribution()
    for milliseconds in (1.0, 2.0, 40.0):
        steps.add(milliseconds * 1e-3)
    return Profile(
        header=Header(rank=3, world_size=4, versions={"lit_fast": "0.1"}, samples_per_step=8.0),
        wall=0.05,
        steps=steps,
        phases=[Phase("forward", 0.03, 3, steps), Phase("unexplained", 0.01, 0)],
        slowest=[SlowStep(2, 0.04, {"forward": 0.03}, ["garbage collection 12 ms"])],
        devices=[Device("H200", [Reading("power", "W", 300.0, 100.0, 700.0, 50)], energy=3.0)],
    )


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    profile = some_profile()
    report = Report(
        [profile, Profile()],
        Comparison("eager", [Compared("step", 2e-3, 1e-3, 0.5, 0.49, 0.51)], 10, 20, 1e-7, 1e-6),
        [Finding("title", "detail", "advice", rank=2)],
    )
    write(profile, tmp_path / "there" / "rank-00003.json")
    write(report, tmp_path / "report.json")
    assert read(tmp_path / "there" / "rank-00003.json") == profile
    assert read(tmp_path / "report.json") == report
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["rank-00003.json"]
    assert profile.phase("forward") == 0.03 and profile.unexplained == pytest.approx(0.2)


def test_a_newer_release_may_add_fields(tmp_path: Path) -> None:
    write(some_profile(), tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    data["header"]["moon"] = "full"
    data["tides"] = [1, 2]
    (tmp_path / "p.json").write_text(json.dumps(data))
    assert read(tmp_path / "p.json") == some_profile()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "is no profile of lit_fast"),
        ('{"traceEvents": []}', "is no profile of lit_fast"),
        ('{"schema": "lit_fast.profile", "version": 99, "header": {"versions": {"lit_fast": "9.0"}}}', "lit_fast 9.0"),
        ('{"schema": "lit_fast.profile", "version": 1, "phases": [{"name": "forward"}]}', "damaged, or was edited"),
        ('{"schema": "lit_fast.profile", "version": 1, "wall": "long"}', "damaged, or was edited"),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        read(path)


def test_what_cannot_be_written_leaves_the_file_before_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.json"
    write(Profile(header=Header(), wall=1.0), path)

    def full() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write(Profile(header=Header(), wall=2.0), path, between=full)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = read(path)
    assert isinstance(found, Profile) and found.wall == 1.0
