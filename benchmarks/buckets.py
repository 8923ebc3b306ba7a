"""Packing one bucket of gradients in one call, against what a hook a parameter does, and against copying its bytes.

A hook of torch's DDP multiplies each gradient into its place of the bucket: `torch.mul(grad, 1 / world, out=view)`. The
floor is `copy_` of one flat tensor into another of the size. Large: two blocks of GPT-2-124M, 57 MB. Small: 150
parameters of 64 elements, where only what the host does counts; giving each `p.grad` its view of the bucket included,
as both do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Rounds, Row

QUICK = True
BLOCK = [
    (2304, 768),
    (2304,),
    (768, 768),
    (768,),
    (768,),
    (768,),
    (3072, 768),
    (3072,),
    (768, 3072),
    (768,),
    (768,),
    (768,),
]
PACK, EACH, COPY = "one call", "torch.mul for each", "copy of the bytes"


def cases(shapes: Sequence[tuple[int, ...]], repeats: int) -> dict[str, Callable[[], float]]:
    """Seconds of one bucket by each way, in float32."""
    import torch

    from lit_fast import ops

    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    [layout] = ops.lay_out_buckets([p.numel() for p in params], first_capacity=1 << 40, capacity=1 << 40, flags=1)
    packer = ops.Packer(params, layout.pieces, layout.used_flags, layout.size)
    wire, source = torch.zeros(layout.size), torch.randn(layout.size)
    views = [wire[at : at + p.numel()].view(p.shape) for p, (_, at) in zip(params, layout.slots, strict=True)]
    grads = [torch.randn(p.shape) for p in params]

    def fresh() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    def pack() -> None:
        packer.pack(wire, 0.5)
        packer.assign(views)

    def each() -> None:
        for p, view in zip(params, views, strict=True):
            torch.mul(p.grad, 0.5, out=view)
            p.grad = view

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            total = 0.0
            for _ in range(repeats):
                fresh()
                total += harness.elapsed(work).wall
            return total / repeats

        return measure

    return {PACK: timed(pack), EACH: timed(each), COPY: timed(lambda: wire.copy_(source))}


def main(argv: Sequence[str] | None = None) -> int:
    options = harness.arguments(__doc__).parse_args(argv)
    large = Rounds(cases(BLOCK * 2, 5), options.rounds)
    small = Rounds(cases([(64,)] * 150, 20), options.rounds)
    bytes_moved = 2 * 4 * sum(_numel(shape) for shape in BLOCK * 2)
    rows = [
        Row("large, against torch.mul for each", large.ratio(PACK, EACH), "ratio", ("<=", 1.05)),
        Row("large, against a copy of the bytes", large.ratio(PACK, COPY), "ratio"),
        Row("large", bytes_moved / large.median(PACK) / 1e9, "GB/s"),
        Row("small, against torch.mul for each", small.ratio(PACK, EACH), "ratio", ("<=", 0.6)),
        Row("small, a parameter", small.median(PACK) / 150 * 1e6, "us"),
    ]
    return harness.finish("buckets", "Packing a bucket of gradients, float32", rows, options)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


if __name__ == "__main__":
    sys.exit(main())
