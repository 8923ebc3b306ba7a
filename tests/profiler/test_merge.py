"""Merging the files of all processes: thousands in bounded memory, and whatever else may lie in the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import new_process
import pytest
from profiles import deep, profile

from lit_fast.cli import report as command
from lit_fast.errors import ProfileError
from lit_fast.profiler.files import read, write
from lit_fast.profiler.merge import EXTREMES, WHOLE, merge, of_profiles, path_of
from lit_fast.profiler.record import Comparison, Profile, Report


def written(folder: Path, number: int, **of_rank_two: float) -> list[Profile]:
    made = [profile(rank=rank, world_size=number, **(of_rank_two if rank == 2 else {})) for rank in range(number)]
    for one in made:
        write(one, path_of(folder, one.header.rank))
    return made


def test_few_profiles_are_kept_whole(tmp_path: Path) -> None:
    made = written(tmp_path, 4)
    report = merge(tmp_path)
    assert report.profiles == made and report == of_profiles(made)
    assert [rank.rank for rank in report.ranks] == [0, 1, 2, 3] and not report.missing and not report.problems
    assert report.ranks[3].phases["forward"] == pytest.approx(0.64) and report.ranks[3].host == "node-0"


def test_of_many_those_of_rank_0_and_of_the_extremes(tmp_path: Path) -> None:
    made = written(tmp_path, 40, forward=6e-3, communication=0.1e-3)
    report = merge(tmp_path)
    assert 2 in [one.header.rank for one in report.profiles] and report.profiles[0] == made[0]
    assert WHOLE >= len(report.profiles) >= 2 * EXTREMES and len(report.ranks) == 40


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written(tmp_path, 10)
    report = merge(tmp_path)
    write(report, tmp_path / "report.json")
    assert read(tmp_path / "report.json") == report
    assert merge(tmp_path) == report, "report.json is none of the ranks' files"


def test_a_comparison_stays_with_the_run_that_it_is_of(tmp_path: Path) -> None:
    made = written(tmp_path, 2)
    comparison = Comparison("eager", windows=20)
    write(Report(profiles=made, comparison=comparison), tmp_path / "report.json")
    assert merge(tmp_path).comparison == comparison
    made[0].header.started = "2020-01-01T00:00:00+00:00"  # another run wrote over the files
    write(made[0], path_of(tmp_path, 0))
    assert merge(tmp_path).comparison is None


def test_files_that_are_no_profile_are_told_and_left_out(tmp_path: Path) -> None:
    written(tmp_path, 8)
    path_of(tmp_path, 3).write_text(path_of(tmp_path, 3).read_text()[:5000])
    path_of(tmp_path, 4).write_text('{"traceEvents": []}')
    old = json.loads(path_of(tmp_path, 5).read_text())
    path_of(tmp_path, 5).write_text(json.dumps({**old, "version": 0}))
    path_of(tmp_path, 6).unlink()
    write(Report(), path_of(tmp_path, 7))
    (tmp_path / ".rank-00009.json.123").write_text("half")
    report = merge(tmp_path)
    assert [rank.rank for rank in report.ranks] == [0, 1, 2] and report.missing == [3, 4, 5, 6, 7]
    for said, name in zip(report.problems, (3, 4, 5, 7), strict=True):
        assert f"rank-0000{name}.json" in said
    assert "is not JSON" in report.problems[0] and "5,000 bytes" in report.problems[0]
    assert "version 0 of the schema" in report.problems[2]


def test_runs_that_were_killed_or_raised(tmp_path: Path) -> None:
    made = written(tmp_path, 3)
    made[1].finished, made[2].ended_by = False, "OutOfMemoryError"
    for one in made:
        write(one, path_of(tmp_path, one.header.rank))
    killed, raised = merge(tmp_path).problems
    assert "rank 1 has not ended its run, or was killed" in killed and "rank 2 was ended by OutOfMemoryError" in raised


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    written(tmp_path, 4)
    spelled_otherwise = profile(rank=1, world_size=4)
    spelled_otherwise.header.script = "/home/ann/train.py"
    write(spelled_otherwise, path_of(tmp_path, 1))
    assert merge(tmp_path).problems == []


def test_what_a_larger_run_has_left_behind_is_left_out_and_said(tmp_path: Path) -> None:
    written(tmp_path, 8)
    for rank in range(4):
        now = profile(rank=rank, world_size=4)
        now.header.started = "2026-11-21T09:30:00+00:00"
        write(now, path_of(tmp_path, rank))
    report = merge(tmp_path)
    assert [rank.rank for rank in report.ranks] == [0, 1, 2, 3] and not report.missing
    assert [one.header.world_size for one in report.profiles] == [4] * 4
    (told,) = report.problems
    assert "Left out: ranks 4, 5, 6, 7 of an earlier run (train.py in 8 processes, begun 2026-11-2" in told


def test_folders_without_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="has no rank-"):
        merge(tmp_path)
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        merge(tmp_path / "elsewhere")
    path_of(tmp_path, 0).write_text("{")
    with pytest.raises(ProfileError, match=r"(?s)no profile that can be read.*is not JSON"):
        merge(tmp_path)


def test_a_report_or_one_process_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, 2)
    assert command.main([str(tmp_path), "--no-html", "--quiet"]) == 0
    before = (tmp_path / "report.json").read_text()
    assert command.main([str(tmp_path / "report.json"), "--no-html"]) == 0
    assert "rank 0 of 2" in capsys.readouterr().out and (tmp_path / "report.json").read_text() == before
    assert command.main([str(path_of(tmp_path, 1)), "--no-html", "--output", str(tmp_path / "one")]) == 0
    assert "rank 1 of 2" in capsys.readouterr().out
    with pytest.raises(ProfileError, match=r"report\.json cannot be written: .*--output names another"):
        command.main([str(tmp_path), "--output", str(path_of(tmp_path, 0)), "--quiet"])


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is put in its place."""
    written(tmp_path, 2)
    usual = Path.read_text

    def refused(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "rank-00001.json":
            raise PermissionError(13, "Permission denied")
        return usual(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    report = merge(tmp_path)
    assert report.missing == [1] and "rank-00001.json cannot be read: Permission denied." in report.problems[0]


def test_an_empty_file(tmp_path: Path) -> None:
    path_of(tmp_path, 0).touch()
    with pytest.raises(ProfileError, match=r"rank-00000\.json is empty"):
        merge(tmp_path)


def test_a_run_without_a_step(tmp_path: Path) -> None:
    write(Profile(finished=True), path_of(tmp_path, 0))
    assert merge(tmp_path).problems == ["rank 0 took no step."]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "in", 4, data=6e-3, communication=0.1e-3)
    assert command.main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--no-html"]) == 0
    said = capsys.readouterr().out
    assert "rank 0 of 4" in said and "1. Rank 2 on node-0 is slower" in said
    found = read(tmp_path / "out" / "report.json")
    assert isinstance(found, Report) and found.findings[0].rank == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


THOUSAND = """
    import resource, sys, time
    from pathlib import Path
    from lit_fast.cli import report
    assert report.main([sys.argv[1], "--output", sys.argv[2], "--quiet"]) == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(time.process_time(), peak)  # of one thread: the seconds of a machine that does nothing else
"""


@pytest.mark.parametrize("ranks", [32, pytest.param(1024, marks=pytest.mark.slow)])
def test_many_ranks_in_seconds_and_in_little_memory(tmp_path: Path, ranks: int) -> None:
    """Files of 100 KB, with what a deep profile on a GPU has; a thousand may take 10 s of a processor and 1 GB."""
    folder = tmp_path / "in"
    for rank in range(8):
        write(deep(profile(rank=rank, world_size=ranks, spans=40)), path_of(folder, rank))
    text = path_of(folder, 7).read_text()
    for rank in range(8, ranks):
        path_of(folder, rank).write_text(text.replace('"rank": 7', f'"rank": {rank}', 1))
    assert os.path.getsize(path_of(folder, ranks - 1)) > 50_000
    done = new_process.output_of(THOUSAND, folder, tmp_path / "out")
    seconds, peak = map(float, done.splitlines()[-1].split())
    assert len(read(tmp_path / "out" / "report.json").ranks) == ranks  # type: ignore[union-attr]
    assert seconds < 10.0 and peak < 1e9, f"{seconds:.1f} s, {peak / 1e6:.0f} MB"
