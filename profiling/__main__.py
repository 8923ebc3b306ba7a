"""python -m profiling [names ...]: every program here against eager PyTorch; a picture, and the table of README.md.

Each program runs in a process of its own, by `lit-fast profile`; what it found is kept in results.json, so that single
ones can be run again. `--draw` only draws what is there. `--lightning PATH` compares with Lightning, too, by that
interpreter, and prints what it found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware
from lit_fast.profiler.files import read
from lit_fast.profiler.record import Report
from lit_fast.profiler.report.units import seconds
from profiling.drawing import DRAWING, draw

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
# Name, what is shown of it, and options of `lit-fast profile`.
PROGRAMS: dict[str, tuple[str, list[str]]] = {
    "mlp": ("MLP, 3K parameters", []),
    "accumulation": ("MLP, accumulation, clipping, schedule", []),
    "manual_optimization": ("GAN, manual optimization", []),
    "cnn": ("residual CNN, 80K parameters", []),
    "gpt_tiny": ("GPT, 0.9M parameters, clipping", []),
    "gpt2_124m": ("GPT-2, 124M parameters, clipping", ["--steps", "12"]),
}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PROGRAMS)}; all by default")
    parser.add_argument("--draw", action="store_true", help="run nothing, draw what results.json holds")
    parser.add_argument("--threads", default="1", help="OMP_NUM_THREADS of each program (default: 1)")
    parser.add_argument("--lightning", metavar="PATH", help="an interpreter that has Lightning")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(PROGRAMS):
        parser.error(f"{', '.join(sorted(unknown))}: allowed are {', '.join(PROGRAMS)}.")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if options.draw else options.names or PROGRAMS:
        if options.lightning is not None:
            run(name, options.threads, ["--against", "lightning", "--lightning-python", options.lightning])
        else:
            results[name] = run(name, options.threads, ["--against", "eager"])
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if options.lightning is None:
        shown = {name: results[name] for name in PROGRAMS if name in results}
        draw({PROGRAMS[name][0]: result for name, result in shown.items()})
        write_table(shown)
        print(f"drawn: {DRAWING}; table: {README}")
    return 0


def run(name: str, threads: str, options: list[str]) -> dict[str, Any]:
    """One program in a process of its own; its comparison, each row's windows left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lit_fast.cli.main", "profile", "--out", folder, *options, *PROGRAMS[name][1]]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([*command, "-m", f"profiling.{name}"], check=True, env=environment, cwd=HERE.parent)
        report = read(Path(folder, "report.json"))
    assert isinstance(report, Report) and report.comparison is not None
    comparison, header = report.comparison, report.profiles[0].header
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "threads": int(threads),
        "versions": header.versions,
        "windows": comparison.windows,
        "steps": comparison.steps,
        "loss_difference": comparison.largest_loss_difference,
        "rows": {
            row.name: [row.baseline, row.ours, *(None if x != x else x for x in (row.ratio, row.low, row.high))]
            for row in comparison.rows
        },
    }


def write_table(results: dict[str, Any]) -> None:
    """Between the two marks of README.md."""
    lines = ["| | eager | lit_fast | ratio, 95 % | forward | backward | optimizer | losses differ by |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, result in results.items():
        rows = result["rows"]
        eager, ours, ratio, low, high = rows["step"]
        of_phases = [rows[phase][2] if phase in rows else None for phase in ("forward", "backward", "optimizer")]
        cells = ["" if each is None else f"{each:.2f}" for each in of_phases]
        step = f"{seconds(eager)} | {seconds(ours)} | **{ratio:.2f}** ({low:.2f} to {high:.2f})"
        link = f"[{PROGRAMS[name][0]}]({name}.py)"
        lines.append(f"| {link} | {step} | {' | '.join(cells)} | {result['loss_difference']:.1g} |")
    where = {
        f"{result['hardware']}, torch {result['versions']['torch']}, {result['threads']} thread(s), {result['date']}"
        for result in results.values()
    }
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([BEGIN, "", *lines, "", "; ".join(sorted(where)) + ".", "", END])
    README.write_text(before + table + after)


if __name__ == "__main__":
    sys.exit(main())
