"""Every optimizer in every precision on GPT-2-124M's shapes: bytes, bandwidth, the machine's ceiling, torch and others.

Without `--all` only what is promised, on two threads. Each case is measured interleaved with its competitors and
with the ceiling; figures are medians. Columns of the table:

- B/param: what one step reads and writes, found on a small parameter by trying: a tensor whose bits change is written,
  one whose change would change the result is read. `clip + step + zero` reads the gradient once more, for its norm;
- GB/s: these bytes through the time, so useful bandwidth: torch's foreach moves more than that;
- ceiling: the fastest of ceiling.cpp's patterns with the same mix of reads and writes, in the same rounds;
- x fused, x foreach: how many times as fast as torch's own step of that name, in the same dtypes where torch has
  them. It has no master weights, 8-bit states or mixed dtypes on the CPU: there it is given the parameters' dtype
  throughout. It has no fused RMSprop, no Lion and no LAMB. Its fused SGD in bfloat16 leaves most of the momentum as
  it was after the first step (torch 2.13 on the CPU), hence 6 bytes where the formula needs 10.

LAMB takes a pass for its norms before the one that is counted. Muon is not here: its time is that of torch's matrix
products.

On a machine whose cores others use too, torch's fused step loses more than ours: it waits for all threads once a
tensor, ours once a step.

`--peer-python NAME=PATH` adds another library from an environment of its own: benchmarks/peers.py says which.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import inspect
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import harness, peers
from benchmarks.harness import Rounds, Row
from benchmarks.peers import FUSED, gpt2_shapes, tensors_of

if TYPE_CHECKING:
    import torch

QUICK = True
OURS, FOREACH = "lit_fast", "torch foreach"
STEP, WHOLE = "step", "clip + step + zero"
PATTERNS = (
    "group group_ahead_512 group_ahead_1024 group_ahead_2048 group_ahead_1024_apart group_ahead_1024_past_cache "
    "group_ahead_1024_new_lines_past_cache page page_ahead_1024 page_ahead_1024_new_lines_past_cache"
).split()
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-4},
    "SGD": {"lr": 1e-4, "momentum": 0.9},
    "Lion": {"lr": 1e-5},
    "Adagrad": {"lr": 1e-4},
    "RMSprop": {"lr": 1e-4},
    "Lamb": {"lr": 1e-4},
}


@dataclass(frozen=True)
class Case:
    """`limits`: what is promised, as (kind, what) -> at least."""

    optimizer: str
    precision: str
    dtype: str  # of parameters and gradients
    storage: dict[str, str] = field(default_factory=dict)  # lit_fast/optim/storage.py
    limits: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.precision}"

    @property
    def kinds(self) -> tuple[str, ...]:
        return (STEP, WHOLE) if self.optimizer == "AdamW" else (STEP,)


SHARE, X_FUSED, X_FOREACH = "share of the ceiling", "times as fast as torch fused", "times as fast as torch foreach"
CASES = [
    Case("AdamW", "float32", "float32", {}, {(STEP, SHARE): 95, (WHOLE, X_FUSED): 1.4}),
    Case("AdamW", "all bfloat16", "bfloat16", {}, {(STEP, X_FUSED): 1.9, (WHOLE, X_FUSED): 3.0}),
    Case(
        "AdamW",
        "bfloat16, float32 master and moments",
        "bfloat16",
        {"state_dtype": "float32", "master": "float32"},
        {(STEP, SHARE): 90},
    ),
    Case(
        "AdamW", "bfloat16, remainder, float32 moments", "bfloat16", {"state_dtype": "float32", "master": "remainder"}
    ),
    Case(
        "AdamW",
        "bfloat16 stochastic, 8-bit moments",
        "bfloat16",
        {"state_dtype": "8bit", "rounding": "stochastic"},
        {(STEP, X_FUSED): 1.0},
    ),
    Case("AdamW", "float32, bfloat16 moments", "float32", {"state_dtype": "bfloat16"}),
    *(
        Case(name, precision, dtype)
        for name in ("SGD", "Lion", "Adagrad", "RMSprop", "Lamb")
        for precision, dtype in (("float32", "float32"), ("all bfloat16", "bfloat16"))
    ),
]

# ---- who competes ----


def makers(case: Case) -> dict[str, Callable[[list[Any]], Any]]:
    """Name of a competitor -> makes its optimizer for parameters."""
    import torch

    ours = getattr(importlib.import_module(f"lit_fast.optim.{case.optimizer.lower()}"), case.optimizer)
    found = {OURS: functools.partial(ours, **OPTIONS[case.optimizer], **case.storage)}
    theirs = getattr(torch.optim, case.optimizer, None)
    for name, option in ((FUSED, "fused"), (FOREACH, "foreach")):
        if theirs is not None and option in inspect.signature(theirs).parameters:
            found[name] = functools.partial(theirs, **OPTIONS[case.optimizer], **{option: True})
    return found


class Competitor:
    """An optimizer, its parameters, and the gradients that it shares with the others."""

    def __init__(self, name: str, make: Callable[[list[Any]], Any], params: list[Any], grads: list[Any]) -> None:
        import torch

        from lit_fast.optim import adopt

        self.params, self.grads, optimizer = params, grads, make(params)
        self.step, self.zero = optimizer.step, optimizer.zero_grad

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        self.clip_and_step: Callable[[], object] = clip_and_step
        if name == OURS:
            adopted = adopt(optimizer, max_norm=1.0)
            assert adopted.compiled, adopted.reason
            self.step, self.clip_and_step = functools.partial(adopted.step, clip=False), adopted.step
            self.zero = adopted.zero_grad

    def measure(self, kind: str) -> harness.Time:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        return harness.elapsed(self.step if kind == STEP else self._whole)

    def _whole(self) -> None:
        self.clip_and_step()
        self.zero()


# ---- what a step reads and writes ----


class Stream(NamedTuple):
    """One tensor of a step, in bytes a parameter."""

    size: float
    read: bool
    written: bool

    @property
    def moved(self) -> float:
        return self.size * (self.read + self.written)


def streams_of(make: Callable[[list[Any]], Any], dtype: torch.dtype) -> dict[str, Stream]:
    import torch

    random = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4096, generator=random).to(dtype))
    growing = 1.3 ** (torch.arange(4096) // 256)  # so that blocks of 8-bit moments have scales of their own
    param.grad = (torch.randn(4096, generator=random) * growing).to(dtype)
    optimizer = make([param])
    optimizer.param_groups[0]["lr"] = 0.1  # so that every step shows in 16 bits
    optimizer.step()
    named = {"parameter": param.data, "gradient": param.grad, **optimizer.state[param]}
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    def after(changed: str | None) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            tensor.copy_(before[name].flip(0) if name == changed else before[name])
        optimizer.step()
        return {name: tensor.clone() for name, tensor in tensors.items()}

    usual = after(None)
    written = {name for name in tensors if not torch.equal(usual[name], before[name])}
    found = {}
    for name, tensor in tensors.items():
        if tensor.numel() > 1:  # the step's number is no part of the traffic
            other = after(name)
            read = any(not torch.equal(other[output], usual[output]) for output in written)
            found[name] = Stream(tensor.numel() * tensor.element_size() / param.numel(), read, name in written)
    return found


# ---- the ceiling ----


class Ceiling:
    """Measures of ceiling.cpp's patterns with the mix of some streams; 8-bit states' scales (1/64 byte) left out."""

    def __init__(self, streams: Sequence[Stream], elements: int, folder: str) -> None:
        import torch

        whole = [stream for stream in streams if stream.size >= 1]
        mix = ",".join(f"{{{int(size)},{int(read)},{int(written)}}}" for size, read, written in whole)
        library = Path(folder) / f"{''.join(filter(str.isdigit, mix))}.so"
        if not library.exists():
            native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
            flags = ["-std=c++20", "-O3", native, "-fopenmp", "-shared", "-fPIC", f"-DSTREAMS={mix}"]
            source = str(Path(__file__).with_name("ceiling.cpp"))
            subprocess.run([os.environ.get("CXX", "g++"), *flags, source, "-o", str(library)], check=True)
        self.count = max(1, elements // 16384) * 16384
        self.bytes = self.count * sum(stream.moved for stream in whole)
        self._arrays = [torch.ones(self.count * int(stream.size), dtype=torch.uint8) for stream in whole]
        assert all(array.data_ptr() % 64 == 0 for array in self._arrays)
        pointers = (ctypes.c_void_p * len(whole))(*(array.data_ptr() for array in self._arrays))
        functions = ctypes.CDLL(str(library))
        self.measures: dict[str, harness.Measure] = {}
        for name in PATTERNS:
            call = functools.partial(getattr(functions, name), pointers, ctypes.c_int64(self.count))
            self.measures[name] = functools.partial(harness.elapsed, call)


# ---- one case ----


@contextmanager
def running_peers(case: Case, threads: int, options: Any) -> Iterator[dict[str, peers.Process]]:
    """The libraries of `--peer-python` that have this case, each in a process."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(peers.Process(name, python, case.dtype, threads, options.parameters))
            for name, python in options.peer_python
            if case.optimizer == "AdamW" and case.precision in peers.PEERS[name].precisions
        }


def measure(case: Case, threads: int, options: Any, folder: str) -> list[Row]:
    import torch

    torch.set_num_threads(threads)  # the patterns run on the same OpenMP runtime
    dtype: torch.dtype = getattr(torch, case.dtype)
    shapes = gpt2_shapes(options.parameters)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    made = makers(case)
    streams = {name: streams_of(make, dtype) for name, make in made.items()}
    ceiling = Ceiling(list(streams[OURS].values()), count // 3, folder)
    grads, *copies = tensors_of(shapes, dtype, 1 + len(made))
    params = [[torch.nn.Parameter(tensor) for tensor in tensors] for tensors in copies]
    del copies
    competitors = {
        name: Competitor(name, make, own, grads) for (name, make), own in zip(made.items(), params, strict=True)
    }
    with running_peers(case, threads, options) as others:
        measures: dict[str, harness.Measure] = {
            f"{kind}, {name}": functools.partial(competitor.measure, kind)
            for kind in case.kinds
            for name, competitor in competitors.items()
        }
        measures.update(ceiling.measures)
        for name, process in others.items():
            measures[name] = functools.partial(process.measure, name)
            measures[f"{name}: {FUSED}"] = functools.partial(process.measure, FUSED)
        rounds = Rounds(measures, options.rounds)
    where = f"{case.name}, {threads} thread{'s' if threads > 1 else ''}"
    promised = threads == 2 and options.parameters is None
    rows = rows_of(case, where, promised, rounds, count, streams, ceiling)
    for name in others:
        rows += peer_rows(f"{where}: {name}", name, rounds)
    return rows


def rows_of(
    case: Case,
    where: str,
    promised: bool,
    rounds: Rounds,
    count: int,
    streams: dict[str, dict[str, Stream]],
    ceiling: Ceiling,
) -> list[Row]:
    """Also prints the case's table. Shares and speed-ups are taken round by round."""
    speeds = {name: ceiling.bytes / rounds.median(name) / 1e9 for name in PATTERNS}
    best = max(speeds, key=speeds.__getitem__)
    print(f"\n{where}: ceiling {speeds[best]:.1f} GB/s by {best}; ", end="")
    print(", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items() if name != best))
    print(", ".join(f"{name} {'r' * s.read}{'w' * s.written} {s.size:g}" for name, s in streams[OURS].items()))
    print(f"{'':<36}{'ms':>9}{'B/param':>10}{'GB/s':>8}{'of ceiling':>12}{'x fused':>10}{'x foreach':>11}")
    rows = [Row(f"{where}: ceiling of its mix", speeds[best], "GB/s")]
    for kind in case.kinds:
        for name, moved in streams.items():
            measured = f"{kind}, {name}"
            size = sum(s.moved for s in moved.values()) + (moved["gradient"].size if kind == WHOLE else 0)
            spent = rounds.median(measured)
            share = 100 * rounds.ratio(best, measured) * size * count / ceiling.bytes
            faster = {
                what: rounds.ratio(f"{kind}, {other}", measured)
                for what, other in ((X_FUSED, FUSED), (X_FOREACH, FOREACH))
                if other in streams
            }
            columns = [f"{faster[what]:.2f}" if what in faster else "-" for what in (X_FUSED, X_FOREACH)]
            figures = f"{size:>10.4g}{size * count / spent / 1e9:>8.1f}{share:>10.0f} %"
            print(f"{measured:<36}{spent * 1e3:>9.1f}{figures}{columns[0]:>10}{columns[1]:>11}")
            rows.append(Row(f"{where}: {measured}", spent * 1e3, "ms"))
            if name == OURS:
                rows.append(Row(f"{where}: {kind}, moved", size, "B/param"))
                for what, value, unit in ((SHARE, share, "%"), *((what, x, "x") for what, x in faster.items())):
                    least = case.limits.get((kind, what)) if promised else None
                    rows.append(Row(f"{where}: {kind}, {what}", value, unit, least and (">=", least)))
    return rows


def peer_rows(where: str, name: str, rounds: Rounds) -> list[Row]:
    """Also prints. Two ratios: with torch's fused step in its own process, and with ours in this one."""
    itself, ours = rounds.ratio(f"{name}: {FUSED}", name), rounds.ratio(name, f"{STEP}, {OURS}")
    spent = rounds.median(name) * 1e3
    print(f"{f'{STEP}, {name}':<36}{spent:>9.1f}{'':>30}{itself:>10.2f}{'':>11}   ours is {ours:.2f} x as fast")
    return [
        Row(f"{where}, {STEP}", spent, "ms"),
        Row(f"{where}, {STEP}, {X_FUSED} in its process", itself, "x"),
        Row(f"{where}, {STEP}, ours times as fast", ours, "x"),
    ]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The README's table of a run, from its rows as `harness.latest` gives them: a line for each case's step."""
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        where, _, what = row["case"].partition(": ")
        cases.setdefault(where, {})[what] = float(row["value"])
    lines = [
        "| a step alone | B/param | GB/s | of the ceiling | x torch fused | x torch foreach |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for where, found in cases.items():
        if f"{STEP}, moved" not in found:
            continue
        share = found[f"{STEP}, {SHARE}"]
        figures = [
            f"{found[f'{STEP}, moved']:.4g}",
            f"{share / 100 * found['ceiling of its mix']:.1f}",
            f"{share:.0f} %",
            *(f"{found[key]:.2f}" if (key := f"{STEP}, {what}") in found else "-" for what in (X_FUSED, X_FOREACH)),
        ]
        lines.append(f"| {where} | {' | '.join(figures)} |")
    return "\n".join([*lines, "| on a GPU | not measured yet | | | | |"]) if len(lines) > 2 else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--all", action="store_true", help="every case, not only those with a promise")
    parser.add_argument("--cases", metavar="TEXT", help="only cases whose name contains this, as 'SGD' or 'remainder'")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--parameters", type=int, metavar="N", help="shrink GPT-2's 124 million to about N")
    parser.add_argument("--peer-python", type=peers.named_python, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file instead")
    options = parser.parse_args(argv)
    chosen = [case for case in CASES if options.all or options.cases or case.limits]
    chosen = [case for case in chosen if (options.cases or "") in case.name]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            for threads in options.threads:
                rows += measure(case, threads, options, folder)
                gc.collect()  # the largest case holds 6 GB; the next one must not stand beside it
    if not rows:
        parser.error(f"--cases={options.cases}: there are {', '.join(case.name for case in CASES)}")
    if options.csv is not None:
        harness.RESULTS, name = options.csv.absolute().parent, options.csv.stem
    else:
        name = "optimizer"
    print()
    return harness.finish(name, "Optimizers on GPT-2-124M's shapes", rows, options)


if __name__ == "__main__":
    raise SystemExit(main())
