"""Loss of a small GPT over 1,000 steps in each way of keeping numbers, ours and torch's on the same batches.

The main job's text and vocabulary, two blocks 64 wide, AdamW with warm-up and a cosine, clipping to norm 1. All runs
see the same batches in the same order; a seed is the first weights, and the random bits of stochastic rounding. Where
torch has no such storage it is given what users write by hand: float32 copies of the weights, which its AdamW steps
after their float32 gradients were clipped. bfloat16 is how weights, gradients and moments are kept; the model computes
in float32 from such weights, since what differs between two runs is to be the optimizer (and a CPU without bfloat16
arithmetic would need ten times as long).

**Distance.** Curves are averaged over windows of 20 steps. Two curves of one seed are as far from each other as their
windows are, absolute, on average over the last half; and, as a second figure, at the worst window of all. Both are then
averaged over the seeds.

**Promise where the numbers are torch's.** From torch's fused, ours is no further than twice torch's foreach: two codes
of one formula by the same hands, so what lies between them is rounding that nobody calls an error. "lit_fast" is what
`adopt(optimizer, max_norm=1.0)` does, clipping included. With torch's clipping before it the step alone has the bits of
torch's fused, so every loss must be the same, which is promised too. A remainder's weight is rounded half up where
torch's cast rounds half to even: there torch is given such a cast. Runs with torch's norm in float64 show what the
rounding of its own does to the curves.

**Promise where 8-bit moments approximate them.** From float32 (torch's fused) of the same seed, ours is no further than
float32 of one seed is from float32 of another: noise is what changes when nothing changes that anybody would choose by.
Two other noises were not taken. Another order of batches would make the bound wider, by the batches' own difficulty,
which all runs here share. One unit in the last place of the first weights would make it narrower, but it measures
for how long a training remembers a rounding, which grows with the steps, and not how good it is: it is shown. Whether
the loss is worse all the same is a signed figure: ours less float32's over the last half, which may be no more than the
standard deviation of float32's between seeds. Weights and moments in bfloat16 are shown the same way, without promise.

Every run's windows go to results/loss_curves.csv; docs/loss_curves.svg is drawn from them, by `--draw` alone as well.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Row

if TYPE_CHECKING:
    import torch

QUICK = False
OURS, STEP_ALONE, FUSED, FOREACH, ONE_ULP, EXACT_NORM = (
    "lit_fast",
    "lit_fast, torch's clipping",
    "torch fused",
    "torch foreach",
    "torch fused, weights one ulp up",
    "torch fused, norm in float64",
)
BLOCK_SIZE, BATCH_SIZE, WARMUP, LEARNING_RATE, MAX_NORM = 32, 4, 100, 2e-3, 1.0
WINDOW = 20  # steps
FLOAT32 = "float32"


@dataclass(frozen=True)
class Precision:
    """`copies`: torch steps float32 copies of the weights, cast back so. `runs`: who is run. `promised`: see above."""

    dtype: str
    storage: dict[str, str] = field(default_factory=dict)
    runs: tuple[str, ...] = (FUSED, FOREACH, STEP_ALONE, OURS, EXACT_NORM)
    copies: str = ""
    promised: bool = True

    @property
    def exact(self) -> bool:
        """torch's numbers, not an approximation of them."""
        return FUSED in self.runs


PRECISIONS = {
    FLOAT32: Precision("float32", runs=(FUSED, FOREACH, STEP_ALONE, OURS, EXACT_NORM, ONE_ULP)),
    "all bfloat16": Precision("bfloat16"),
    "bfloat16, float32 master and moments": Precision(
        "bfloat16", {"state_dtype": "float32", "master": "float32"}, copies="half to even"
    ),
    "bfloat16, remainder, float32 moments": Precision(
        "bfloat16", {"state_dtype": "float32", "master": "remainder"}, copies="half up"
    ),
    "all bfloat16, stochastic": Precision("bfloat16", {"rounding": "stochastic"}, runs=(OURS,), promised=False),
    "float32, 8-bit moments": Precision("float32", {"state_dtype": "8bit"}, runs=(OURS,)),
    "bfloat16 stochastic, 8-bit moments": Precision(
        "bfloat16", {"state_dtype": "8bit", "rounding": "stochastic"}, runs=(OURS,)
    ),
}
# of a precision, by who ran it, one for each seed: a loss a step, or the mean of a window
Curves = dict[str, list[list[float]]]


# ---- runs ----


def batches(steps: int, texts: Sequence[str] | None) -> tuple[list[torch.Tensor], int]:
    """(as many batches as steps, rows of the token embedding)."""
    import torch

    from lit_fast.cli.pretrain import parse
    from lit_fast.data.tokens import prepare_tokens

    settings = parse(["--preset=tiny"])
    data = prepare_tokens(texts, vocab_size=settings.vocab_size, val_fraction=settings.val_fraction)
    torch.manual_seed(0)
    found: list[torch.Tensor] = []
    while len(found) < steps:
        found += itertools.islice(data.dataloader("train", BLOCK_SIZE, BATCH_SIZE), steps - len(found))
    return found, -(-settings.vocab_size // 64) * 64


def stepper(
    name: str, precision: Precision, params: list[torch.nn.Parameter], seed: int
) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    """(whose learning rate is set, clipping and step)."""
    import torch
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from lit_fast.optim import adopt

    ours = name in (OURS, STEP_ALONE)
    copies = [torch.nn.Parameter(param.detach().float()) for param in params] if precision.copies else params
    fused, foreach = (None, None) if ours else (name != FOREACH, name == FOREACH)
    stepped = params if ours else copies
    optimizer = torch.optim.AdamW(stepped, weight_decay=0.1, fused=fused, foreach=foreach)
    storage: dict[str, Any] = {**precision.storage, "seed": seed} if precision.storage else {}
    if name == OURS:
        return optimizer, adopt(optimizer, max_norm=MAX_NORM, **storage).step
    take = adopt(optimizer, **storage).step if ours else optimizer.step

    @torch.no_grad()
    def step() -> None:
        if copies is not params:
            for copy, param in zip(copies, params, strict=True):
                copy.grad = None if param.grad is None else param.grad.float()
        grads = [copy.grad for copy in copies if copy.grad is not None]
        norm = get_total_norm([grad.double() for grad in grads] if name == EXACT_NORM else grads)
        clip_grads_with_norm_(copies, MAX_NORM, norm)
        if ours and copies is not params:  # the gradients that torch has clipped are not the parameters'
            take(torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0).item())
            return
        take()
        if copies is not params:
            for copy, param in zip(copies, params, strict=True):
                param.copy_(rounded_half_up(copy) if precision.copies == "half up" else copy)

    return optimizer, step


def rounded_half_up(value: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16; torch's cast differs where the lower 16 bits are half of the upper's last place."""
    import torch

    return ((value.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def losses(name: str, precision: Precision, data: Sequence[torch.Tensor], vocab_size: int, seed: int) -> list[float]:
    """One run, nats a token at each step. Those of one precision and seed differ in nothing but clipping and step."""
    import torch

    from lit_fast.models import GPT
    from lit_fast.models.language_model import warmup_cosine

    torch.manual_seed(seed)
    model = GPT(vocab_size, block_size=BLOCK_SIZE, num_layers=2, num_heads=2, embedding_dim=64).train()
    weights = list(model.parameters())
    if name == ONE_ULP:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    dtype: torch.dtype = getattr(torch, precision.dtype)
    params = weights if dtype == torch.float32 else [torch.nn.Parameter(w.detach().to(dtype)) for w in weights]
    optimizer, step = stepper(name, precision, params, seed)
    curve = []
    for index, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup_cosine(index, WARMUP, len(data), 0.1)
        if params is not weights:
            with torch.no_grad():
                for weight, param in zip(weights, params, strict=True):
                    weight.copy_(param)
        loss = model.loss(batch)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if params is not weights:
            for param, weight in zip(params, weights, strict=True):
                param.grad = None if weight.grad is None else weight.grad.to(dtype)
        step()
        curve.append(loss.item())
    return curve


# ---- figures ----


def windowed(curve: Sequence[float]) -> list[float]:
    return [statistics.fmean(curve[first : first + WINDOW]) for first in range(0, len(curve), WINDOW)]


def apart(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(mean distance over the last half, the worst window), averaged over pairs of curves, in windows."""
    gaps = [[abs(a - b) for a, b in zip(one, other, strict=True)] for one, other in zip(ones, others, strict=True)]
    return statistics.fmean(map(mean_of_last_half, gaps)), statistics.fmean(map(max, gaps))


def last_half(windows: Sequence[float]) -> Sequence[float]:
    return windows[len(windows) // 2 :]


def mean_of_last_half(windows: Sequence[float]) -> float:
    return statistics.fmean(last_half(windows))


def noise(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How far float32 of one seed is from float32 of another, over all pairs."""
    pairs = list(itertools.combinations(seeds, 2))
    return apart([one for one, _ in pairs], [other for _, other in pairs])


def rows_of(raw: dict[str, Curves]) -> list[Row]:
    smooth: dict[str, Curves] = {
        where: {name: [windowed(curve) for curve in of_one] for name, of_one in runs.items()}
        for where, runs in raw.items()
    }
    rows: list[Row] = []
    for where, runs in smooth.items():
        if PRECISIONS[where].exact:
            rows += rows_against_torch(where, runs)
            unlike = sum(a != b for a, b in zip(flat(raw[where][STEP_ALONE]), flat(raw[where][FUSED]), strict=True))
            rows.append(Row(f"{where}: losses unlike torch fused's, with its clipping", unlike, "losses", ("<=", 0)))
    runs = smooth[FLOAT32]
    between = noise(runs[FUSED])
    deviation = statistics.stdev(map(mean_of_last_half, runs[FUSED]))
    rows += [
        *compared("float32: curve of one seed from another's", between),
        Row("float32: loss of the last half, standard deviation between seeds", deviation, "nats"),
        *compared("float32: curve after one ulp in the first weights", apart(runs[ONE_ULP], runs[FUSED])),
    ]
    for where, approximate in smooth.items():
        if not PRECISIONS[where].exact:
            rows += rows_against_float32(where, approximate[OURS], runs[FUSED], between, deviation)
    return rows


def rows_against_torch(where: str, runs: Curves) -> list[Row]:
    theirs, ours = (apart(runs[name], runs[FUSED]) for name in (FOREACH, OURS))
    in_float64 = apart(runs[OURS], runs[EXACT_NORM])
    return [
        *compared(f"{where}: torch foreach's curve from torch fused's", theirs),
        *compared(f"{where}: our curve from torch fused's", ours, [2 * far for far in theirs]),
        *compared(f"{where}: our curve from torch fused's with a norm in float64", in_float64),
    ]


def rows_against_float32(
    where: str, ours: list[list[float]], base: list[list[float]], between: tuple[float, float], deviation: float
) -> list[Row]:
    promised = PRECISIONS[where].promised
    worse = statistics.fmean(map(mean_of_last_half, ours)) - statistics.fmean(map(mean_of_last_half, base))
    limit = ("<=", deviation) if promised else None
    return [
        *compared(f"{where}: our curve from float32's", apart(ours, base), between if promised else None),
        Row(f"{where}: our loss above float32's, last half", worse, "nats", limit),
    ]


def compared(case: str, found: Sequence[float], limits: Sequence[float] | None = None) -> list[Row]:
    """A row for each of what `apart` gives."""
    kinds = ("mean", "worst window")
    promises = [None, None] if limits is None else [("<=", limit) for limit in limits]
    return [
        Row(f"{case}, {kind}", value, "nats", limit) for kind, value, limit in zip(kinds, found, promises, strict=True)
    ]


def flat(curves: Sequence[Sequence[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(curves))


# ---- files ----


def write(raw: dict[str, Curves]) -> None:
    """One line a run; columns are the last steps of the windows."""
    with (harness.RESULTS / "loss_curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        steps = len(raw[FLOAT32][FUSED][0])
        ends = [min(first + WINDOW, steps) for first in range(0, steps, WINDOW)]
        writer.writerow(["precision", "optimizer", "seed", *ends])
        for where, runs in raw.items():
            for name, of_one in runs.items():
                for seed, curve in enumerate(of_one):
                    writer.writerow([where, name, seed, *(f"{mean:.8g}" for mean in windowed(curve))])


def read() -> tuple[list[int], dict[str, Curves]]:
    """(last steps of the windows, their means)."""
    found: dict[str, Curves] = {}
    with (harness.RESULTS / "loss_curves.csv").open(newline="") as file:
        reader = csv.reader(file)
        ends = [int(end) for end in next(reader)[3:]]
        for where, name, _, *means in reader:
            found.setdefault(where, {}).setdefault(name, []).append([float(mean) for mean in means])
    return ends, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each kind (default %(default)s; at least 2)")
    parser.add_argument("--data", nargs="+", help="text files or folders; default: Python's standard library")
    parser.add_argument("--draw", action="store_true", help="only draw the curves of the last run")
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error(f"--seeds={options.seeds}: the noise is what differs between seeds, at least 2")
    if not options.draw:
        data, vocab_size = batches(options.steps, options.data)
        curves: dict[str, Curves] = {}
        for where, precision in PRECISIONS.items():
            curves[where] = {
                name: [losses(name, precision, data, vocab_size, seed) for seed in range(options.seeds)]
                for name in precision.runs
            }
            print(f"{where}: done", flush=True)
        if not options.no_save:
            write(curves)
    if options.draw or not options.no_save:
        from benchmarks.curves_drawing import draw

        draw(*read())
    if options.draw:
        return 0
    title = f"Loss of a small GPT over {options.steps} steps, {options.seeds} seeds"
    return harness.finish("curves", title, rows_of(curves), options)


if __name__ == "__main__":
    raise SystemExit(main())
