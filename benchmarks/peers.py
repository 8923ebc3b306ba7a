"""Other libraries' AdamW for benchmarks/optimizer.py, each in a process and an environment of its own.

`python -m benchmarks.peers NAME ...` is that process. It holds the library's optimizer and torch's fused one on the
same shapes, and steps one of them whenever a line on its input names it: so two processes are measured in turn,
and one idles while the other works.

Seen to run on Linux x86-64, each beside `torch==2.13.0+cpu`, which has to be pinned lest pip takes CUDA's:

- bitsandbytes 0.50.2, `AdamW8bit`: runs as it comes;
- torchao 0.18.0, `AdamW8bit` with stochastic rounding: needs a C++ compiler, and minutes for torch.compile at first;
- deepspeed 0.19.8, `DeepSpeedCPUAdam`: needs ninja, setuptools and a C++ compiler, and minutes at first; install it
  with DS_BUILD_OPS=0 and --no-build-isolation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from benchmarks import harness

if TYPE_CHECKING:
    import torch

FUSED = "torch fused"


def gpt2_shapes(parameters: int | None = None) -> list[tuple[int, ...]]:
    """148 tensors, 124.4 million parameters; or as many tensors with fewer rows, about `parameters` in all."""
    width = 768
    block: list[tuple[int, ...]] = [(width,)] * 4
    for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
        block += [(rows, columns), (rows,)]
    shapes = [(50257, width), (1024, width), *block * 12, (width,), (width,)]
    share = 1.0 if parameters is None else parameters / 124_439_808
    return [(max(1, round(rows * share)), *columns) for rows, *columns in shapes]


def tensors_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, copies: int) -> list[list[torch.Tensor]]:
    """Random values, the same in each copy."""
    import torch

    random = torch.Generator().manual_seed(0)
    first = [torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=random) for shape in shapes]
    return [first, *([tensor.clone() for tensor in first] for _ in range(copies - 1))]


# ---- the libraries ----


def bitsandbytes_adamw(params: list[Any]) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-4)


def torchao_adamw(params: list[Any]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4, bf16_stochastic_round=True)


def deepspeed_adamw(params: list[Any]) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=1e-4, adamw_mode=True, fp32_optimizer_states=False)


@dataclass(frozen=True)
class Peer:
    """A library's AdamW, and the precisions of benchmarks/optimizer.py in which it is compared."""

    make: Callable[[list[Any]], Any]
    precisions: tuple[str, ...]


PEERS = {
    "bitsandbytes": Peer(bitsandbytes_adamw, ("bfloat16 stochastic, 8-bit moments",)),
    "torchao": Peer(torchao_adamw, ("bfloat16 stochastic, 8-bit moments",)),
    "deepspeed": Peer(deepspeed_adamw, ("float32", "all bfloat16")),
}


def named_python(text: str) -> tuple[str, str]:
    """`NAME=PATH` of the command line."""
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a NAME of {', '.join(PEERS)}")
    return name, path


# ---- the two ends ----


class Process:
    """The other process, seen from the benchmark's: `measure(name)` has it take one step."""

    def __init__(self, name: str, python: str, dtype: str, threads: int, parameters: int | None) -> None:
        command = [python, "-m", "benchmarks.peers", name, "--dtype", dtype, "--threads", str(threads)]
        command += [] if parameters is None else ["--parameters", str(parameters)]
        path = os.pathsep.join([str(harness.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # A library may have an OpenMP runtime of its own, which torch.set_num_threads does not reach.
        around = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        around["PATH"] = os.pathsep.join([os.path.dirname(python), os.environ.get("PATH", os.defpath)])  # its ninja
        self._process = subprocess.Popen(
            command, cwd=harness.ROOT, env=around, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, name: str) -> harness.Time:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, process.args))} ended with {process.wait()}: see above")
        return harness.Time(*json.loads(answer))

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parameters", type=int)
    options = parser.parse_args(argv)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print and compile as they like: nothing of it is an answer
    import torch

    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    grads, *copies = tensors_of(gpt2_shapes(options.parameters), dtype, 3)
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in (
        (options.name, PEERS[options.name].make),
        (FUSED, lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True)),
    ):
        params = [torch.nn.Parameter(tensor) for tensor in copies.pop()]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        steps[name] = make(params).step
        for _ in range(2):  # the first one makes the state and, in torchao, the kernels; the second may compile again
            steps[name]()
    for line in sys.stdin:
        print(json.dumps(harness.elapsed(steps[line.strip()])), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
