"""Loss of a small GPT over 1,000 steps in each precision: ours, torch's fused and torch's foreach on the same batches.

The main job's text, two blocks 64 wide, AdamW, clipping to norm 1; weights and order of batches from one seed. Where
torch has no such storage it is given what users write by hand: float32 copies of the weights, which its AdamW steps.
The distance of two curves is the root mean square of their differences over all steps. Promised is that ours is no
further from torch's fused than torch's foreach is from its fused, doubled. 8-bit and bfloat16 moments are compared
with float32 ones, of which they are an approximation: these distances only inform.

The curves go to results/loss_curves.csv and are drawn into docs/loss_curves.svg; `--draw` only draws (matplotlib).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import ROOT, Row

if TYPE_CHECKING:
    import torch

QUICK = False
OURS, FUSED, FOREACH = "lit_fast", "torch fused", "torch foreach"
BLOCK_SIZE, BATCH_SIZE, WARMUP, LEARNING_RATE = 64, 4, 100, 1e-3


@dataclass(frozen=True)
class Precision:
    """`masters`: torch's parameters are stepped by hand-written float32 copies. `exact`: torch's numbers, not an
    approximation of them."""

    dtype: str
    storage: dict[str, str] = field(default_factory=dict)
    masters: bool = False
    exact: bool = True


PRECISIONS = {
    "float32": Precision("float32"),
    "all bfloat16": Precision("bfloat16"),
    "bfloat16, float32 master and moments": Precision(
        "bfloat16", {"state_dtype": "float32", "master": "float32"}, masters=True
    ),
    "bfloat16, remainder, float32 moments": Precision(
        "bfloat16", {"state_dtype": "float32", "master": "remainder"}, masters=True
    ),
    "bfloat16 stochastic, 8-bit moments": Precision(
        "bfloat16", {"state_dtype": "8bit", "rounding": "stochastic"}, masters=True, exact=False
    ),
    "float32, bfloat16 moments": Precision("float32", {"state_dtype": "bfloat16"}, exact=False),
}


def batches(steps: int) -> tuple[list[torch.Tensor], int]:
    """(as many batches as steps, rows of the token embedding)."""
    import torch

    from lit_fast.cli.pretrain import parse
    from lit_fast.data.tokens import prepare_tokens

    settings = parse(["--preset=tiny"])
    data = prepare_tokens(None, vocab_size=settings.vocab_size, val_fraction=settings.val_fraction)
    torch.manual_seed(0)
    found: list[torch.Tensor] = []
    while len(found) < steps:
        found += data.dataloader("train", BLOCK_SIZE, BATCH_SIZE)
    return found[:steps], -(-settings.vocab_size // 64) * 64


def losses(name: str, precision: Precision, data: Sequence[torch.Tensor], vocab_size: int) -> list[float]:
    """One curve. The competitors differ in nothing but the optimizer."""
    import torch

    from lit_fast.models import GPT
    from lit_fast.optim.adamw import AdamW

    torch.manual_seed(0)
    model = GPT(vocab_size, block_size=BLOCK_SIZE, num_layers=2, num_heads=2, embedding_dim=64)
    model.to(getattr(torch, precision.dtype)).train()
    params = list(model.parameters())
    stepped, optimizer = params, None
    if name == OURS:
        optimizer = AdamW(params, weight_decay=0.1, **precision.storage)
    else:
        if precision.masters:
            stepped = [torch.nn.Parameter(param.detach().float()) for param in params]
        optimizer = torch.optim.AdamW(stepped, weight_decay=0.1, fused=name == FUSED, foreach=name == FOREACH)
    curve = []
    for step, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        loss: Any = model.loss(batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if stepped is not params:
            for master, param in zip(stepped, params, strict=True):
                master.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
        if stepped is not params:
            with torch.no_grad():
                for master, param in zip(stepped, params, strict=True):
                    param.copy_(master)
        curve.append(loss.item())
    return curve


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))


def rows_of(where: str, precision: Precision, curves: dict[str, list[float]]) -> list[Row]:
    ours, theirs = distance(curves[OURS], curves[FUSED]), distance(curves[FOREACH], curves[FUSED])
    last = {name: sum(curve[-100:]) / len(curve[-100:]) for name, curve in curves.items()}
    return [
        *(Row(f"{where}: {name}, mean of the last 100 steps", value, "nats") for name, value in last.items()),
        Row(f"{where}: distance of torch foreach from torch fused", theirs, "nats"),
        Row(
            f"{where}: distance of ours from torch fused", ours, "nats", ("<=", 2 * theirs) if precision.exact else None
        ),
    ]


def write(curves: dict[str, dict[str, list[float]]]) -> None:
    with (harness.RESULTS / "loss_curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["precision", "optimizer", "step", "loss"])
        for precision, of_one in curves.items():
            for name, curve in of_one.items():
                writer.writerows([precision, name, step, f"{loss:.6g}"] for step, loss in enumerate(curve, 1))


def draw() -> None:
    """docs/loss_curves.svg: one field a precision, each curve averaged over 20 steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lit_fast", "font.size": 8})
    from matplotlib import pyplot

    curves: dict[str, dict[str, list[float]]] = {}
    with (harness.RESULTS / "loss_curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["precision"], {}).setdefault(row["optimizer"], []).append(float(row["loss"]))
    figure, fields = pyplot.subplots(2, 3, figsize=(10, 5.5), sharex=True, sharey=True, layout="constrained")
    for place, (precision, of_one) in zip(fields.flat, curves.items(), strict=False):
        for (name, curve), line in zip(of_one.items(), ("-", "--", ":"), strict=False):
            means = [sum(curve[i : i + 20]) / len(curve[i : i + 20]) for i in range(0, len(curve), 20)]
            place.plot(range(10, 10 + 20 * len(means), 20), means, line, label=name, linewidth=1.2)
        place.set_title(precision)
        place.grid(alpha=0.3)
    fields[0, 0].legend()
    figure.supxlabel("step")
    figure.supylabel("loss (nats a token)")
    figure.savefig(ROOT / "docs" / "loss_curves.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--draw", action="store_true", help="only draw the curves of the last run")
    options = parser.parse_args(argv)
    if options.draw:
        draw()
        return 0
    data, vocab_size = batches(options.steps)
    curves: dict[str, dict[str, list[float]]] = {}
    rows: list[Row] = []
    for where, precision in PRECISIONS.items():
        names = (OURS, FUSED, FOREACH)
        curves[where] = {name: losses(name, precision, data, vocab_size) for name in names}
        rows += rows_of(where, precision, curves[where])
        print(f"{where}: done", flush=True)
    if not options.no_save:
        write(curves)
        draw()
    return harness.finish("curves", f"Loss of a small GPT over {options.steps} steps", rows, options)


if __name__ == "__main__":
    raise SystemExit(main())
