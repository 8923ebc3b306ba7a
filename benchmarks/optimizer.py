"""Clip to norm 1, AdamW and zero_grad on GPT-2-124M's shapes: the compiled step against torch's own.

Everything is measured interleaved, in one run. Bytes a parameter are those that the work needs (the gradient read
once for the norm and once for the step, nothing rewritten), so GB/s is useful bandwidth. The ceiling is this
machine's best pattern with the step's own mix of reads and writes (ceiling.cpp), measured in the same rounds.

On a machine whose cores others use too, torch's fused step loses more than ours: it waits for all threads once a
tensor, ours once a step.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Rounds, Row

if TYPE_CHECKING:
    import torch

QUICK = True
OURS, FUSED, FOREACH = "lit_fast", "torch fused", "torch foreach"
STEP_MIXES = {f"step_mix_{ahead}": 28 for ahead in ("plain", "512", "1024", "2048")}
PATTERNS = {**STEP_MIXES, "read_one_stream": 4, "read_four_streams": 4, "copy_two": 16}  # bytes an element


def gpt2_shapes(layers: int, width: int = 768) -> list[tuple[int, ...]]:
    """With 12 layers 148 tensors, 124.4 million parameters."""
    block: list[tuple[int, ...]] = [(width,)] * 4
    for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        block += [(rows, columns), (rows,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


class Case:
    """Parameters with a gradient each, and one way to clip, step and zero them."""

    def __init__(self, name: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> None:
        import torch

        from lit_fast.optim import adopt

        self.params = [torch.nn.Parameter(torch.empty(s, dtype=dtype).normal_(std=0.02)) for s in shapes]
        self.grads = [torch.empty_like(p).normal_(std=1e-3).detach() for p in self.params]
        optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=name == FUSED, foreach=name == FOREACH)
        if name == OURS:
            adopted = adopt(optimizer, max_norm=1.0)
            assert adopted.compiled, adopted.reason
            self._clip_and_step: Callable[[], object] = adopted.step
            self._step: Callable[[], object] = lambda: adopted.step(clip=False)
            self._zero: Callable[[], object] = adopted.zero_grad
        else:
            self._step, self._zero = optimizer.step, optimizer.zero_grad

            def clip_and_step() -> None:
                torch.nn.utils.clip_grad_norm_(self.params, 1.0)
                optimizer.step()

            self._clip_and_step = clip_and_step

    def whole(self) -> harness.Time:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

        def work() -> None:
            self._clip_and_step()
            self._zero()

        return harness.elapsed(work)

    def step(self) -> harness.Time:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        return harness.elapsed(self._step)


def ceiling_library(folder: str) -> ctypes.CDLL:
    source, library = Path(__file__).with_name("ceiling.cpp"), Path(folder) / "ceiling.so"
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = ["-O3", native, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run([os.environ.get("CXX", "g++"), *flags], check=True)
    return ctypes.CDLL(str(library))


def pattern(library: ctypes.CDLL, name: str, arrays: Sequence[torch.Tensor]) -> Callable[[], harness.Time]:
    pointers = [ctypes.cast(a.data_ptr(), ctypes.POINTER(ctypes.c_float)) for a in arrays]
    count = ctypes.c_int64(arrays[0].numel())
    return lambda: harness.elapsed(lambda: getattr(library, name)(*pointers, count))


def rows_of(rounds: Rounds, where: str, count: int, size: int, elements: int, promised: bool) -> list[Row]:
    """Also prints the table. Medians throughout; shares of the ceiling are taken round by round."""

    def speed(name: str) -> float:
        return elements * PATTERNS[name] / rounds.median(name) / 1e9

    best = max(STEP_MIXES, key=speed)
    print(f"\n{where}: " + ", ".join(f"{name} {speed(name):.1f}" for name in PATTERNS) + " GB/s")
    print(f"{'':<34}{'ms':>9}{'x fused':>9}{'B/param':>9}{'GB/s':>8}{'of ceiling':>12}")
    rows = [Row(f"{where}: ceiling of the step's mix", speed(best), "GB/s")]
    for kind, accesses in (("clip + step + zero", 8), ("step", 7)):
        for name in (OURS, FUSED, FOREACH):
            case = f"{kind}, {name}"
            spent, faster = rounds.median(case), rounds.ratio(f"{kind}, {FUSED}", case)
            moved = count * accesses * size
            share = rounds.ratio(best, case) * moved / (elements * PATTERNS[best])
            figures = f"{accesses * size:>9}{moved / spent / 1e9:>8.1f}{share:>12.0%}"
            print(f"{case:<34}{spent * 1e3:>9.1f}{faster:>9.2f}{figures}")
            rows.append(Row(f"{where}: {case}", spent * 1e3, "ms"))
            if name == OURS:
                limit = (">=", 1.4) if promised and kind != "step" else None
                rows.append(Row(f"{where}: {kind}, times as fast as {FUSED}", faster, "x", limit))
                rows.append(Row(f"{where}: {kind}, share of the ceiling", 100 * share, "%"))
    return rows


def measure(options: Any, library: ctypes.CDLL) -> list[Row]:
    import torch

    shapes = gpt2_shapes(options.layers)
    count = sum(torch.Size(s).numel() for s in shapes)
    arrays = [torch.ones(torch.Size(shapes[0]).numel() // 16384 * 16384) for _ in range(4)]
    rows: list[Row] = []
    print(f"{len(shapes)} tensors, {count / 1e6:.1f} M parameters, {options.rounds} rounds")
    for dtype_name in options.dtypes:
        dtype: torch.dtype = getattr(torch, dtype_name)
        cases = {name: Case(name, dtype, shapes) for name in (OURS, FUSED, FOREACH)}
        for threads in options.threads:
            torch.set_num_threads(threads)  # the patterns run on the same OpenMP runtime
            measures: dict[str, harness.Measure] = {}
            for name, case in cases.items():
                measures[f"clip + step + zero, {name}"] = case.whole
                measures[f"step, {name}"] = case.step
            measures.update({name: pattern(library, name, arrays) for name in PATTERNS})
            rounds = Rounds(measures, options.rounds)
            where = f"{dtype_name}, {threads} thread{'s' if threads > 1 else ''}"
            promised = dtype_name == "float32" and threads == 2 and options.layers == 12
            rows += rows_of(rounds, where, count, dtype.itemsize, arrays[0].numel(), promised)
        del cases
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=12, help="12 for GPT-2-124M (default %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file instead")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, ceiling_library(folder))
    if options.csv is not None:
        harness.RESULTS, name = options.csv.absolute().parent, options.csv.stem
    else:
        name = "optimizer"
    print()
    return harness.finish(name, "AdamW on GPT-2-124M's shapes", rows, options)


if __name__ == "__main__":
    raise SystemExit(main())
