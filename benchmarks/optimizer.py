"""Clip, AdamW and zero_grad on GPT-2-124M's shapes: the compiled step against torch's own, interleaved.

    python -m benchmarks.optimizer [--threads 1 2] [--dtypes float32 bfloat16] [--rounds 7]

Every row of a thread count and dtype is measured in turn, round by round; the medians and their ratios are
printed. Bytes a parameter are those that the work needs (gradient read once for the norm, once for the step, no
rewriting), so GB/s is useful bandwidth. The ceiling is this machine's best over several access patterns
(ceiling.cpp), measured in the same run, with the step's own mix of reads and writes among them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import Row
from lit_fast import ops
from lit_fast.optim import adopt

QUICK = True

PATTERNS = {  # name in ceiling.cpp -> bytes an element
    "step_mix_plain": 28,
    "step_mix_512": 28,
    "step_mix_1024": 28,
    "step_mix_2048": 28,
    "read_all": 16,
    "read_one": 4,
    "copy_two": 16,
}


def gpt2_shapes(layers: int = 12, width: int = 768) -> list[tuple[int, ...]]:
    """148 tensors, 124.4 million parameters."""
    block: list[tuple[int, ...]] = []
    for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        block += [(rows, columns), (rows,)]
    block += [(width,)] * 4
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


class Case:
    """Parameters with a gradient each, and one way to clip, step and zero them."""

    def __init__(self, name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
        self.name = name
        self.params = [torch.nn.Parameter(torch.empty(s, dtype=dtype).normal_(std=0.02)) for s in shapes]
        self.grads = [torch.empty_like(p).normal_(std=1e-3).detach() for p in self.params]
        fused, foreach = name.startswith("torch fused"), name.startswith("torch foreach")
        optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=fused or None, foreach=foreach or None)
        adopted = adopt(optimizer)
        adopted_clipped = adopt(optimizer, max_norm=1.0)

        def with_torch() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def with_core() -> None:
            adopted_clipped.step()
            adopted_clipped.zero_grad()

        mine = name == "lit_fast"
        self.whole: Callable[[], object] = with_core if mine else with_torch
        self.step_only: Callable[[], object] = adopted.step if mine else optimizer.step

    def attach(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure(cases: list[Case], repeats: int) -> dict[tuple[str, str], float]:
    """Median milliseconds of ("whole" | "step", case name), interleaved."""
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):
        for kind in ("whole", "step"):
            for case in cases:
                case.attach()
                spent = milliseconds(case.whole if kind == "whole" else case.step_only)
                if repeat > 0:  # the first round warms up: state is created, pages are touched
                    times.setdefault((kind, case.name), []).append(spent)
    return {key: statistics.median(values) for key, values in times.items()}


def load_ceiling(folder: str) -> ctypes.CDLL:
    source, library = Path(__file__).with_name("ceiling.cpp"), Path(folder) / "ceiling.so"
    compiler = os.environ.get("CXX", "g++")
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = ["-O3", native, "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def ceiling(library: ctypes.CDLL, case: Case, threads: int, repeats: int) -> dict[str, float]:
    """GB/s of every pattern, best of `repeats`, on four arrays as long as the largest tensor of `case`."""
    n = case.params[0].numel() // 16384 * 16384
    arrays = [torch.ones(n) for _ in range(4)]
    pointers = [ctypes.cast(a.data_ptr(), ctypes.POINTER(ctypes.c_float)) for a in arrays]
    torch.set_num_threads(threads)  # the same OpenMP runtime serves both
    found: dict[str, float] = {}
    for _ in range(repeats):
        for name, width in PATTERNS.items():
            spent = milliseconds(lambda name=name: getattr(library, name)(*pointers, ctypes.c_int64(n)))  # type: ignore[misc]
            found[name] = max(found.get(name, 0.0), n * width / spent / 1e6)
    return found


def needed_bytes(dtype: torch.dtype, kind: str) -> int:
    """Bytes a parameter: p, g, m, v read and p, m, v written; for the whole also g read for the norm."""
    size = torch.empty((), dtype=dtype).element_size()
    return (7 if kind == "step" else 8) * size


def run(arguments: argparse.Namespace) -> list[dict[str, object]]:
    shapes = gpt2_shapes(arguments.layers)
    count = sum(torch.Size(s).numel() for s in shapes)
    print(f"{len(shapes)} tensors, {count / 1e6:.1f} M parameters; torch {torch.__version__}")
    info = ops.build_info()
    print(f"core: {info['cpu_target']} ({info['cpu_target_reason']}); threads: {info['threads']}")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        library = load_ceiling(folder)
        for dtype_name in arguments.dtypes:
            dtype = getattr(torch, dtype_name)
            cases = [Case(name, dtype, shapes) for name in ("torch fused", "torch foreach", "lit_fast")]
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                bandwidths = ceiling(library, cases[0], threads, 3)
                best = max(v for k, v in bandwidths.items() if k.startswith("step_mix"))
                print(
                    f"\n{dtype_name}, {threads} thread(s). GB/s by pattern: "
                    + ", ".join(f"{k} {v:.1f}" for k, v in bandwidths.items())
                )
                medians = measure(cases, arguments.rounds)
                rows += table(medians, dtype, threads, count, best)
            del cases
    return rows


def table(
    medians: dict[tuple[str, str], float], dtype: torch.dtype, threads: int, count: int, best: float
) -> list[dict[str, object]]:
    print(f"{'work':<26}{'ms':>9}{'x fused':>9}{'B/param':>9}{'GB/s':>8}{'of ceiling':>12}")
    rows: list[dict[str, object]] = []
    for (kind, name), spent in sorted(medians.items(), reverse=True):
        needed = needed_bytes(dtype, kind)
        speed = count * needed / spent / 1e6
        ratio = medians[(kind, "torch fused")] / spent
        label = ("clip + step + zero" if kind == "whole" else "step") + ", " + name
        print(f"{label:<26.40}{spent:>9.1f}{ratio:>9.2f}{needed:>9}{speed:>8.1f}{speed / best:>11.0%}")
        rows.append(
            {
                "work": kind,
                "name": name,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "ms": round(spent, 2),
                "times_fused": round(ratio, 3),
                "bytes_per_parameter": needed,
                "gb_per_s": round(speed, 2),
                "ceiling_gb_per_s": round(best, 2),
            }
        )
    return rows


def rows_of(found: list[dict[str, object]]) -> list[Row]:
    """What the table holds, as figures with the promise: whole work in float32 on two threads."""
    rows = []
    for one in found:
        label = "clip + step + zero" if one["work"] == "whole" else "step"
        case = f"{label}, {one['dtype']}, {one['threads']} thread(s), {one['name']}"
        rows.append(Row(case, float(str(one["ms"])), "ms"))
        if one["name"] != "lit_fast":
            continue
        promised = one["work"] == "whole" and one["dtype"] == "float32" and one["threads"] == 2
        times, speed, best = (float(str(one[k])) for k in ("times_fused", "gb_per_s", "ceiling_gb_per_s"))
        rows.append(Row(f"{case}: times as fast as torch fused", times, "x", (">=", 1.4) if promised else None))
        rows.append(Row(f"{case}: useful bandwidth", speed, "GB/s"))
        rows.append(Row(f"{case}: share of this machine's ceiling", speed / best, "x"))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes)
    parser.add_argument("--layers", type=int, default=12, help="12 for 124 M parameters")
    options = parser.parse_args(argv)
    rows = rows_of(run(options))
    return harness.finish("optimizer", "Optimizer step, GPT-2-124M shapes, on the CPU", rows, options)


if __name__ == "__main__":
    raise SystemExit(main())
