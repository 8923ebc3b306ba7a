"""The report in a terminal: what it says, in 80 columns, with and without colours, whatever names users choose."""

from __future__ import annotations

import io
import re

import pytest
from profiles import comparison, deep, profile
from rich.console import Console

from lit_fast.profiler.merge import of_profiles
from lit_fast.profiler.record import Distribution, Part, Phase, Profile, Report, SlowStep
from lit_fast.profiler.report.terminal import print_report, render


def printed(report: Report) -> str:
    out = io.StringIO()
    print_report(report, out)
    return out.getvalue()


def test_rows_add_up_to_the_wall_time() -> None:
    text = printed(of_profiles([profile()]))
    rows = [re.fullmatch(r"(\w+) +([\d.]+) %.*? ([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)", r) for r in text.splitlines()]
    found = {row[1]: (float(row[2]), float(row[3]), float(row[4])) for row in rows if row}
    total = found.pop("sum")
    assert list(found)[:4] == ["data", "transfer", "forward", "backward"] and list(found)[-1] == "unexplained"
    assert total == (100.0, 2.0, 10.1)
    for column, slack in ((0, 0.05), (1, 0.0005), (2, 0.005)):  # of one rounded figure
        assert abs(sum(row[column] for row in found.values()) - total[column]) <= slack * len(found)
    assert "wall 2.00 s" in text and "Nothing stands out." in text


def test_the_header_and_the_slowest_steps() -> None:
    text = printed(of_profiles([profile()]))
    for said in ("commit 0123abc", "10,800,000 parameters", "AMD EPYC 7763", "99.4 steps/s", "407k tokens/s"):
        assert said in text
    assert re.search(r"step 96 +15\.1 ms +garbage collection 3 ms", text)
    assert re.search(r"step 193 +15\.0 ms +backward \+2\.\d+ ms", text)
    assert re.search(r"A step: p50 (9\.9\d|10\.\d) ms, .* longest 15\.1 ms", text)


def test_hidden_communication_is_told_below_the_rows() -> None:
    assert "Hidden behind other work, and in no row: 2.00 ms of communication a step." in printed(of_profiles([deep()]))
    assert "Hidden" not in printed(of_profiles([profile()]))


def test_utilization_is_told_with_its_peak() -> None:
    text = printed(of_profiles([deep()]))
    assert "27.8 TFLOP/s of the model's own, MFU 2.8 % of 989 TFLOP/s" in text


def all_kinds() -> list[Report]:
    compared = of_profiles([deep(profile(rank=rank, world_size=4, communication=1e-3)) for rank in range(4)])
    compared.comparison = comparison()
    odd = profile(hooks=5e-3, data=5e-3)
    odd.parts.append(Part("hooks", "[bold]" + "very_long_name." * 12 + "[/nothing]", 1.0, 200, "/a/" * 40 + ".py:1"))
    odd.phases.append(Phase("something of a later release", 0.1, 3))
    return [of_profiles([profile()]), compared, of_profiles([odd]), of_profiles([Profile()])]


@pytest.mark.parametrize("report", all_kinds())
def test_it_fits_into_80_columns(report: Report) -> None:
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and not re.search(r" $", text, re.MULTILINE)


def test_a_comparison_stands_beside_the_rows_uncut() -> None:
    text = printed(all_kinds()[1])
    assert re.search(r"phase +share +eager +lit_fast +change +ratio +95 %", text) and "…" not in text
    assert re.search(r"communication +[\d.]+ % +- +- +- +- +-\n", text)
    assert re.search(r"optimizer +[\d.]+ % +2\.00 +1\.20 +-0\.80 +0\.60 +0\.57 to 0\.64", text)
    assert re.search(r"sum +100\.0 % +11\.2 +10\.0 +-1\.20 +0\.89 +0\.88 to 0\.91", text)
    assert "nan" not in text and text.count("0.88 to 0.91") == 1, "each figure stands there once"


def compiled() -> Profile:
    """Its first step took 10 s more, which torch.compile needed."""
    made = profile()
    for row in made.phases:
        if row.name == "forward":
            row.seconds += 10.0
            row.per_step.add(10.0032)
            row.per_step.count -= 1
    made.wall += 10.0
    made.steps.total += 10.0
    slow = SlowStep(0, 10.01, {"forward": 10.0032}, ["the first step", "compilation 10 s"])
    made.steps.maximum, made.slowest = slow.seconds, [slow, *made.slowest[:9]]
    return made


def test_the_step_that_compiled_is_told_apart() -> None:
    text = " ".join(printed(of_profiles([compiled()])).split())
    assert "200 steps, a run of 12.0 s, 10.1 ms each but for 1 step that compiled, 99." in text
    assert "Nothing stands out." in text


def test_rows_that_are_in_no_step_say_so() -> None:
    made = profile()
    row = next(row for row in made.phases if row.name == "hooks")
    row.per_step, row.seconds, made.wall = Distribution(), row.seconds + 1.0, made.wall + 1.0
    made.parts.append(Part("hooks", "[Callback]Slow.on_fit_start", 1.0, 1))
    text = printed(of_profiles([made]))
    assert re.search(r"hooks .* - +- +-\n", text)
    assert "(hooks mostly [Callback]Slow.on_fit_start, 1.00 s)" in " ".join(text.split())


def test_of_too_few_steps_nothing_is_claimed() -> None:
    assert "Too few steps to find anything in: 4" in printed(of_profiles([profile(steps=4)]))


def test_names_are_no_markup() -> None:
    text = printed(all_kinds()[2])
    assert "[bold]very_long_name." in text and "[/nothing] is slow" in text.replace("\n   ", "")


def test_colours_in_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor")
    with console.capture() as captured:
        console.print(render(of_profiles([profile()])))
    assert "\x1b[" in captured.get() and "█" in captured.get()


def test_a_stream_that_knows_no_other_characters() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    report = of_profiles([profile(hooks=1e-3)])
    report.profiles[0].parts.append(Part("hooks", "Überwachung.on_train_batch_end", 0.2, 200))
    print_report(report, out)
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "##############" in text and "?berwachung" in text


def test_doubts_are_told() -> None:
    killed, jumped = profile(rank=0, world_size=4), profile(rank=1, world_size=4)
    killed.finished = False
    jumped.warnings = ["The system's clock jumped: 3602.0 s went by on it."]
    report = of_profiles([killed, jumped])
    report.missing = [2, 3]
    text = " ".join(printed(report).split())
    assert "2 ranks of 4 left no file: 2, 3." in text
    assert "rank 0 has not ended its run, or was killed" in text
    assert "rank 1: The system's clock jumped: 3602.0 s went by on it." in text
