"""The benchmarks' own arithmetic and files: a promise that is not kept must be seen."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import curves, curves_drawing, harness, optimizer, peers
from benchmarks.__main__ import NAMES
from benchmarks.harness import Rounds, Row, Time


def test_rounds_compare_within_a_round_and_turn_the_order() -> None:
    calls: list[str] = []
    drift = itertools.count(1)

    def case(name: str, cost: float) -> float:
        calls.append(name)
        # Both cases of a round cost the same multiple: only their ratio is steady.
        return cost * (1 + (next(drift) - 1) // 2)

    rounds = Rounds({"a": lambda: case("a", 3.0), "b": lambda: case("b", 2.0)}, rounds=4)
    assert rounds.ratio("a", "b") == 1.5
    assert len(rounds.values("a")) == 4
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]


def test_time_has_two_clocks() -> None:
    assert Time(1.0, 0.5).slope(Time(3.0, 1.5), steps=4, unit=10) == Time(5.0, 2.5)
    rounds = Rounds({"a": lambda: Time(4.0, 1.0), "b": lambda: Time(2.0, 1.0)}, rounds=1)
    assert (rounds.ratio("a", "b"), rounds.ratio("a", "b", cpu=True)) == (2.0, 1.0)
    assert rounds.difference("a", "b") == 2.0
    spent = harness.elapsed(lambda: sum(range(100_000)))
    assert spent.wall > 0 and spent.cpu > 0


@pytest.mark.parametrize(
    ("limit", "value", "kept"),
    [(("<=", 0.5), 0.5, True), (("<=", 0.5), 0.51, False), ((">=", 1.4), 1.3, False), (None, 9.0, None)],
)
def test_promises(limit: tuple[str, float] | None, value: float, kept: bool | None) -> None:
    assert Row("case", value, "x", limit).kept is kept


def test_results_name_machine_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    options = harness.arguments(None).parse_args(["--check"])
    rows = [Row("fast", 0.25, "x", ("<=", 0.5)), Row("seen", 12.0, "us")]
    assert harness.finish("trial", "Trial", rows, options) == 0
    assert harness.finish("trial", "Trial", [Row("slow", 0.75, "x", ("<=", 0.5))], options) == 1
    kept = harness.latest("trial")
    assert kept[-1]["case"] == "slow" and kept[-1]["limit"] == "<= 0.5"
    assert all(kept[-1][key] for key in ("date", "hardware", "threads", "python", "torch", "lit_fast"))
    assert "| slow | 0.75 x | <= 0.5 |" in harness.markdown(["trial"])
    assert harness.markdown(["nothing_ran_yet"]) == ""


def test_every_benchmark_can_be_called() -> None:
    folder = Path(harness.__file__).parent
    assert {"gpu", "import_time", "log_cost", "step_overhead", "validation"} <= set(NAMES)
    for name in NAMES:
        text = (folder / f"{name}.py").read_text()
        assert "def main(" in text and "QUICK = " in text, f"{name} has main(argv) and QUICK"


def test_pseudo_terminal_passes_output_and_exit_code() -> None:
    program = "import os, sys; print(sys.stdout.isatty(), *os.get_terminal_size()); sys.exit(3)"
    assert harness.in_terminal([sys.executable, "-c", program]) == (3, b"True 80 24\r\n")


def test_bars_draw_whole_lines_in_the_pseudo_terminal(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    program = """
import time
from lit_fast import Trainer
from lit_fast.callbacks import RichProgressBar, TQDMProgressBar
from lit_fast.demos import BoringModel
class Slow(BoringModel):
    def training_step(self, batch, batch_idx):
        time.sleep(0.01)  # all together longer than the bar's thread takes to open the terminal
        return super().training_step(batch, batch_idx)
for bar in (RichProgressBar(), TQDMProgressBar()):
    print("@@")
    Trainer(max_epochs=1, callbacks=bar, accelerator="cpu", limit_val_batches=0, logger=False).fit(Slow())
"""
    code, screen = harness.in_terminal([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path)
    assert code == 0, screen.decode()
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screen.decode())
    _, rich, tqdm = text.split("@@")
    for drawn, full in (
        (rich, r"[\r\n](Epoch 0/0 ━{10,} 64/64 .*it/s) *[\r\n]"),
        (tqdm, r"\r(Epoch 0: 100%\|█{10,}\| 64/64 \[[^\r\n]*it/s\])"),
    ):
        line = re.search(full, drawn)
        assert line is not None and 60 < len(line[1]) <= 80, drawn


def test_redraws_do_not_count_newlines() -> None:
    from benchmarks.step_overhead import redraws

    screen = b"@@ a @@\r\nline\r\n\rbar 1\rbar 2\r\n@@ end @@\r\nbetween\r@@ b @@\r\n@@ end @@"
    assert redraws(screen) == {"a": 2, "b": 0}


def test_the_table_lands_between_the_markers_of_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{harness.BEGIN}\nold\n{harness.END}\nbottom\n")
    for _ in range(2):
        harness.write_between("| new |", readme)
        assert readme.read_text() == f"top\n{harness.BEGIN}\n| new |\n{harness.END}\nbottom\n"


def test_the_readme_shows_chosen_rows_and_says_which_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"hardware": "h", "torch": "t", "lightning": "", "date": "2026-01-01 00:00", "commit": "abc", "unit": "x"}
    rows = [
        {**common, "case": "quick", "value": "0.4", "limit": "<= 0.5"},
        {**common, "case": "slow", "value": "0.4", "limit": ">= 0.5"},
        {**common, "case": "only said", "value": "7", "limit": ""},
    ]
    monkeypatch.setattr(harness, "latest", lambda name: rows)
    table = harness.headlines([("b", "quick", "it is quick"), ("b", "slow", "it is slow")])
    assert "| it is quick | 0.4 x | <= 0.5 |" in table and "| it is slow | 0.4 x | >= 0.5 (missed) |" in table
    assert "b: h, torch t, 2026-01-01, commit abc" in table
    assert harness.promises(["b"]) == (1, 2)
    assert "| slow | 0.4 x | >= 0.5 | missed |" in harness.markdown(["b"])
    with pytest.raises(KeyError, match="no row 'gone'"):
        harness.headlines([("b", "gone", "")])


def test_every_row_that_the_readme_shows_was_measured() -> None:
    from benchmarks.__main__ import HEADLINES

    assert harness.headlines(HEADLINES).count("\n| ") == len(HEADLINES)


def test_the_table_of_optimizers_has_a_line_for_each_case() -> None:
    made = {
        "AdamW, float32, 2 threads: ceiling of its mix": 40.0,
        "AdamW, float32, 2 threads: step, moved": 28,
        "AdamW, float32, 2 threads: step, share of the ceiling": 95.0,
        "AdamW, float32, 2 threads: step, times as fast as torch fused": 1.25,
        "AdamW, float32, 2 threads: clip + step + zero, moved": 32,
        "Lion, float32, 2 threads: ceiling of its mix": 50.0,
        "Lion, float32, 2 threads: step, moved": 20,
        "Lion, float32, 2 threads: step, share of the ceiling": 100.4,
    }
    _, _, adamw, lion, gpu = optimizer.table([{"case": k, "value": str(v)} for k, v in made.items()]).splitlines()
    assert adamw == "| AdamW, float32, 2 threads | 28 | 38.0 | 95 % | 1.25 | - |"
    assert lion == "| Lion, float32, 2 threads | 20 | 50.2 | 100 % | - | - |"
    assert "not measured yet" in gpu and optimizer.table([]) == ""


# Read and written, of parameter, gradient and states; 8-bit states have a float32 scale for each 256 codes.
BYTES = {
    "AdamW, float32": 28,
    "AdamW, all bfloat16": 14,
    "AdamW, bfloat16, float32 master and moments": 28,
    "AdamW, bfloat16, remainder, float32 moments": 26,
    "AdamW, bfloat16 stochastic, 8-bit moments": 10 + 2 * 2 * 4 / 256,
    "AdamW, float32, bfloat16 moments": 20,
    "Lamb, float32": 28,
    "Lamb, all bfloat16": 14,
    **{f"{name}, float32": 20 for name in ("SGD", "Lion", "Adagrad", "RMSprop")},
    **{f"{name}, all bfloat16": 10 for name in ("SGD", "Lion", "Adagrad", "RMSprop")},
}


@pytest.mark.parametrize("case", optimizer.CASES, ids=lambda case: case.name)
def test_bytes_of_a_step_are_found_by_trying(case: optimizer.Case) -> None:
    streams = optimizer.streams_of(optimizer.makers(case)[optimizer.OURS], getattr(torch, case.dtype))
    assert sum(stream.moved for stream in streams.values()) == BYTES[case.name]
    assert streams["gradient"].read and not streams["gradient"].written
    assert streams["parameter"].written and streams["parameter"].read is ("master" not in streams)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the ceiling is C++")
def test_optimizers_are_measured_beside_the_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", harness.RESULTS)
    arguments = ["--cases=remainder", "--parameters=200000", "--rounds=1", "--threads=1"]
    assert optimizer.main([*arguments, f"--csv={tmp_path / 'trial.csv'}"]) == 0
    found = {row["case"].rpartition(": ")[2]: float(row["value"]) for row in harness.latest("trial")}
    assert found["step, moved"] == 26 and found["clip + step + zero, moved"] == 28
    assert found["ceiling of its mix"] > 0 and found["step, times as fast as torch fused"] > 0


def test_a_peer_steps_when_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that prints, as libraries do: that must not be taken for an answer."""
    (tmp_path / "bitsandbytes.py").write_text(
        "import torch\nprint('hello')\nclass optim:\n    AdamW8bit = torch.optim.AdamW\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with peers.Process("bitsandbytes", sys.executable, "float32", threads=1, parameters=100_000) as process:
        for name in ("bitsandbytes", peers.FUSED, "bitsandbytes"):
            assert process.measure(name).wall > 0


def test_small_shapes_keep_gpt2s_number_of_tensors() -> None:
    sizes = [[math.prod(shape) for shape in peers.gpt2_shapes(parameters)] for parameters in (None, 1_000_000)]
    assert len(sizes[0]) == len(sizes[1]) == 148
    assert sum(sizes[0]) == 124_439_808 and 0.9e6 < sum(sizes[1]) < 1.1e6


def test_curves_further_than_torchs_own_are_seen() -> None:
    """Windows of 20 steps: the last two of four for the mean, any for the worst."""
    flat, bumpy = [0.0] * 80, [0.0] * 20 + [0.5] * 20 + [0.25] * 20 + [0.0] * 20
    assert curves.windowed(bumpy) == [0, 0.5, 0.25, 0]
    assert curves.apart([curves.windowed(flat)], [curves.windowed(bumpy)]) == (0.125, 0.5)
    assert curves.noise([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]]) == pytest.approx((4 / 3, 4 / 3))

    def kept(ours: float) -> list[bool | None]:
        runs = {name: [flat, flat] for name in curves.PRECISIONS[curves.FLOAT32].runs}
        runs[curves.FOREACH] = [[0.25 * value for value in bumpy]] * 2
        runs[curves.OURS] = [[ours * value for value in bumpy]] * 2
        rows = curves.rows_of({curves.FLOAT32: runs})
        return [row.kept for row in rows if row.case.startswith("float32: our curve from torch fused's, ")]

    assert kept(0.0) == kept(0.5) == [True, True]
    assert kept(0.625) == [False, False]


def test_noise_needs_two_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        curves.main(["--seeds=1"])
    assert "--seeds=1: the noise is what differs between seeds" in capsys.readouterr().err


def test_a_rounding_that_torch_has_not() -> None:
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-9])
    assert curves.rounded_half_up(ties).float().tolist() == [1 + 2**-7, 1 + 2**-6, -1 - 2**-7, 1.0]


def test_a_drawing_keeps_what_it_says_and_turns_to_night() -> None:
    svg = '<svg><defs></defs><path d="M 1.23456 20.5" style="stroke: #0072b2"/><text>0.12345</text></svg>'
    drawn = curves_drawing.with_night(curves_drawing.short(svg))
    assert '<path d="M 1.23 20.5" style="stroke: #0072b2"/><text>0.12345</text>' in drawn
    assert '[style*="stroke: #0072b2"]{stroke:#56b4e9!important}' in drawn


def test_curves_of_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(curves_drawing, "DRAWING", tmp_path / "curves.svg")
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.py"
    text.write_text("".join(f"def function_{i}(value):\n    return value * {i * i} + {i}\n\n\n" for i in range(400)))
    arguments = [f"--data={text}", "--steps=2", "--seeds=2"]
    assert curves.main(arguments) == 0
    found = {row["case"]: row for row in harness.latest("curves")}
    unlike = [row for case, row in found.items() if case.endswith("losses unlike torch fused's, with its clipping")]
    assert len(unlike) == 4 and all(row["value"] == row["limit"].removeprefix("<= ") == "0" for row in unlike)
    ulp = found["float32: curve after one ulp in the first weights, mean"]["value"]
    assert 0 <= 10 * float(ulp) < float(found["float32: curve of one seed from another's, mean"]["value"])
    assert found["bfloat16 stochastic, 8-bit moments: our curve from float32's, mean"]["limit"].startswith("<= ")

    ends, kept = curves.read()
    assert ends == [2] and kept.keys() == curves.PRECISIONS.keys()
    assert all(len(seeds) == 2 for runs in kept.values() for seeds in runs.values())
    drawn = (tmp_path / "curves.svg").read_text()
    (tmp_path / "curves.svg").unlink()
    assert curves.main(["--draw"]) == 0
    assert (tmp_path / "curves.svg").read_text() == drawn  # nothing of the day or the folder is in it
    assert "prefers-color-scheme: dark" in drawn and all(where in drawn for where in curves.PRECISIONS)
