"""`python -m benchmarks [NAME ...]`: the quick ones, or those named; `--readme` prints the last results.

With `--readme --write` the whole table goes into docs/benchmarks.md, and the few rows of `HEADLINES` into README.md.

A benchmark is a file here with `main(argv) -> int`; the quick ones say `QUICK = True`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import harness, optimizer

_BESIDE = ("harness", "peers", "curves_drawing", "simulated_network", "__init__", "__main__")
_FIRST = ("step_overhead", "pretrain", "optimizer")  # what a reader of the README wants to know
_FOUND = [p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _BESIDE]
NAMES = [*_FIRST, *sorted(set(_FOUND) - {*_FIRST, "curves"}), "curves"]

HEADLINES = (
    ("step_overhead", "full, CSV / hand loop", "a step with logging, checkpoints and progress bar / a loop by hand"),
    ("step_overhead", "Lightning, full, CSV / hand loop", "... the same under Lightning"),
    ("step_overhead", "bare / hand loop", "... with all of that off"),
    ("step_overhead", "Lightning, bare / hand loop", "... the same under Lightning"),
    ("pretrain", "gpt2-124m: faster than eager, own processes", "pretraining GPT-2 124M, times as fast as eager"),
    (
        "optimizer",
        "AdamW, float32, 2 threads: clip + step + zero, times as fast as torch fused",
        "AdamW with clipping, times as fast as torch's fused one",
    ),
    (
        "ddp_step",
        "small GPT, 2 processes: a step, ours / torch DDP, loop by hand",
        "a step of two processes / torch's DDP in a loop by hand",
    ),
    (
        "exposed_communication",
        "Llama 1B, InfiniBand NDR, 64 ranks: exposed, ours / torch DDP",
        "waiting for gradients of a Llama 1B, 64 ranks, simulated link / torch's DDP",
    ),
    (
        "exposed_communication",
        "GPT-2 124M, InfiniBand NDR, 64 ranks: exposed, ours / torch DDP",
        "... of a GPT-2 124M, whose largest gradient comes last",
    ),
    ("log_cost", "one more self.log(name, tensor)", "one more `self.log`"),
    ("callback_cost", "five hooks of the step, a callback", "one more callback with five hooks of the step"),
    ("profiler_cost", "step profiler", '`profiler="step"`, a step'),
    ("import_time", "import lit_fast; lit_fast.Trainer, beyond import torch", "`import lit_fast`, beyond torch"),
    (
        "curves",
        "bfloat16 stochastic, 8-bit moments: our loss above float32's, last half",
        "loss of a small GPT in 6 bytes a parameter, above float32's",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--readme", action="store_true", help="print the last results as a markdown table")
    parser.add_argument("--write", action="store_true", help="with --readme: into docs/benchmarks.md and README.md")
    options, passed_on = parser.parse_known_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.readme:
        names = options.names or NAMES
        parts = [harness.markdown(names), optimizer.table(harness.latest("optimizer")) if "optimizer" in names else ""]
        table = "\n\n".join(filter(None, parts))
        if options.write:
            kept, of = harness.promises(NAMES)
            said = f"{kept} of {of} promises are kept: [all of them](docs/benchmarks.md), with what is missed."
            harness.write_between(table, harness.ROOT / "docs" / "benchmarks.md")
            harness.write_between(f"{harness.headlines(HEADLINES)}\n\n{said}", harness.ROOT / "README.md")
        else:
            print(table)
        return 0
    code = 0
    for name in options.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        if options.names or getattr(module, "QUICK", False):
            code = max(code, module.main(passed_on))
            sys.stdout.flush()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
