"""The page: one file, nothing from anywhere else, every section in its place, and text that stays text."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from profiles import comparison, deep, profile

from lit_fast.cli import report as command
from lit_fast.profiler import merge
from lit_fast.profiler.files import write
from lit_fast.profiler.record import Part, Phase, Profile, Report
from lit_fast.profiler.report.html import page, write_html

EVIL = "<script>window.evil = 1</script></script><img src=x onerror='window.evil = 2'>\\u003c`${window.evil = 3}`"


def everything() -> Report:
    made = [deep(profile(rank=rank, world_size=4, communication=3e-3 if rank != 2 else 0.2e-3,
                         forward=3.2e-3 if rank != 2 else 6e-3)) for rank in range(4)]  # fmt: skip
    report = merge.of_profiles(made)
    report.comparison = comparison()
    return report


class Reader(HTMLParser):
    """Sections by their id, the text outside of scripts and styles, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.fetched: list[str] = []
        self.outside: list[str] = []
        self._section, self._quiet = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._quiet = tag in ("script", "style")
        self.fetched += [str(given[name]) for name in ("src", "href") if given.get(name)]
        if tag == "section":
            self._section = str(given["id"])
            self.sections[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        self._quiet = False
        self._section = "" if tag == "section" else self._section

    def handle_data(self, data: str) -> None:
        if not self._quiet:
            self.outside.append(data)
            if self._section:
                self.sections[self._section] += data + " "


@pytest.fixture(scope="module")
def full() -> str:
    return page(everything())


def test_every_section_has_its_place(full: str) -> None:
    found = Reader(full)
    assert list(found.sections) == [
        "findings", "run", "step", "comparison", "steps", "named", "timeline", "ranks", "memory", "kernels", "syncs",
        "sensors", "not-shown",
    ]  # fmt: skip
    for section, said in {
        "findings": "Rank 2 on node-0 is slower than the others",
        "run": "MFU 2.2 % of 989 TFLOP/s (NVIDIA's data sheet, bfloat16, dense)",
        "step": "their sum is its wall time, 2.60 s.",
        "comparison": "medians of 12 windows of 20 steps in turns; the ratio's interval holds 95 % of a bootstrap. "
        "Losses differ by 3e-07 of a loss at most (allowed: 1e-05).",
        "steps": "garbage collection 3 ms",
        "named": "[Callback]TQDMProgressBar.on_train_batch_end",
        "ranks": "sm clock 1905 MHz",
        "memory": "1.35 GiB, most of it activations",
        "kernels": "467 TFLOP/s",
        "syncs": "if loss.item() > 10:",
        "sensors": "1,024 J in",
        "not-shown": "SM activity: NVML offers it to root only here",
    }.items():
        assert said in " ".join(found.sections[section].split()), section


def test_it_is_one_small_file_that_fetches_nothing(full: str) -> None:
    assert len(full.encode()) < 2_000_000
    assert all(address.startswith(("#", "data:")) for address in Reader(full).fetched)
    assert "default-src 'none'" in full


def test_what_is_not_there_is_said_to_be() -> None:
    found = Reader(page(merge.of_profiles([profile()])))
    assert list(found.sections) == ["findings", "run", "step", "steps", "named", "timeline", "not-shown"]
    for said in ("Memory over a step: Trainer(profiler='deep')", "Ranks: one process", "Energy and sensors: no sensor"):
        assert said in " ".join(found.sections["not-shown"].split())
    assert "Recording took 1.80 us a step (0.0 %)." in " ".join(found.outside)


def test_a_run_without_a_step_has_a_page() -> None:
    found = Reader(page(merge.of_profiles([Profile()])))
    assert "rank 0 took no step." in found.sections["problems"]
    assert "How long steps took: no step was taken" in " ".join(found.sections["not-shown"].split())


def test_names_are_text_wherever_they_stand() -> None:
    made = deep(profile(hooks=2e-3))
    made.parts.append(Part("hooks", EVIL, 0.3, 200, EVIL))
    made.phases.append(Phase(EVIL, 0.1, 1))
    made.header.module = made.header.script = made.header.host = made.ended_by = EVIL
    made.header.notes, made.warnings, made.devices[0].name = [EVIL], [EVIL], EVIL
    for listed in (made.kernels, made.timeline):
        listed[0].name = EVIL
    made.slowest[0].causes, made.syncs[0].line, made.memory.peak_owner = [EVIL], EVIL, EVIL
    text = page(merge.of_profiles([made]))
    assert "<script>window" not in text and "<img" not in text and "</script></script>" not in text
    found = Reader(text)
    assert sum(EVIL in section for section in found.sections.values()) >= 7


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(profile(), merge.path_of(tmp_path, 0))
    assert command.main([str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-00000.json", "report.html", "report.json"]


def test_bokeh_is_imported_for_a_page_only() -> None:
    code = "import lit_fast.profiler.report.html, lit_fast.cli.report, sys; assert 'bokeh' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_bokeh_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(ModuleNotFoundError, match=r"report\.html is drawn by Bokeh: pip install"):
        write_html(merge.of_profiles([profile()]), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
