"""How long a step waits for the network after its backward: our buckets against torch's DDP, on simulated links.

Gradients of GPT-2-124M's and Llama-1B's sizes arrive in the order of a real backward, at the times at which a GPU would
have computed them (`TFLOPS`, `TOKENS`), whatever the host does meanwhile. Models and bandwidths are `SCALE` times
smaller: transfers take the times of the whole models, and copies about those of a GPU, whose memory is as much faster
than this machine's. What a host does for each parameter and bucket takes the time that it takes here.

Exposed is the time from the last gradient's arrival until every mean is in place. The same step on an instant link
shows how much of that is not the link's. Everything is measured interleaved, with medians of rounds. On a
machine that others use, too, run it under `chrt -f 5` (as root): it mostly sleeps, and must be woken in time.

On paper, the same arithmetic goes on to 1,024 ranks: torch's rule for filling buckets and ours on a serial link. No
order of whole gradients on it can end earlier than the bound that is printed beside.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from benchmarks import harness
from benchmarks.harness import Row

QUICK = False
SCALE = 256  # HBM3's 3.3 TB/s to the 10 to 20 GB/s of a core
TOKENS = 16_384  # of a rank's backward: 16 sequences of 1,024
TFLOPS = 400e12  # 40 % of what an H100 does in bfloat16
MEBIBYTE = 1 << 20
MODELS = ("GPT-2 124M", "Llama 1B")
CAPS = (5, 10, 25, 50, 100, 200, 400)  # MiB, torch DDP's bucket_cap_mb
MEASURED = [("NVLink", 8), ("InfiniBand NDR", 16), ("InfiniBand NDR", 64), ("InfiniBand HDR", 64), ("100 GbE", 16)]
PAPER_RANKS = (2, 8, 64, 1024)


# ---- when gradients arrive ----


class Gradient(NamedTuple):
    """One parameter's, `arrival` s after backward has begun; float32."""

    name: str
    numel: int
    arrival: float


@functools.cache
def gradients(model: str) -> list[Gradient]:
    """In the order in which a real backward of the model hands them out.

    A matrix takes 4 FLOPs a weight and token, for its own gradient and its input's; embeddings, norms and biases take
    next to nothing, and attention's own products are left out. A head tied to the embedding is computed first and
    arrives last, when the embedding's part has been added.
    """
    import torch

    from lit_fast.models.gpt import GPT
    from lit_fast.models.llama import Llama

    with torch.device("meta"):
        whole = {"GPT-2 124M": GPT, "Llama 1B": Llama}[model]()
    # The order depends on how layers are joined, not on how wide they are.
    small = type(whole)(vocab_size=8, block_size=8, embedding_dim=2 * whole.hparams["num_heads"])
    order: list[str] = []
    for name, parameter in small.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    small(torch.zeros(1, 8, dtype=torch.long)).sum().backward()

    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    matrices = {f"{name}.weight" for name, part in whole.named_modules() if isinstance(part, torch.nn.Linear)}
    seconds = {name: 4 * sizes[name] * TOKENS / TFLOPS for name in matrices & sizes.keys()}
    now = 0.0
    if "head.weight" not in sizes:
        now = 4 * sizes["token_embedding.weight"] * TOKENS / TFLOPS
    found = []
    for name in order:
        now += seconds.get(name, 0.0)
        found.append(Gradient(name, sizes[name], now))
    return found


# ---- on paper ----


def torch_buckets(sizes: Sequence[float], first: float, cap: float) -> list[int]:
    """Where torch's DDP ends its buckets: each is closed by the gradient that fills it to its cap or beyond."""
    ends, filled, limit = [], 0.0, first
    for index, size in enumerate(sizes, 1):
        filled += size
        if filled >= limit:
            ends.append(index)
            filled, limit = 0.0, cap
    return ends if filled == 0 else [*ends, len(sizes)]


class Paper(NamedTuple):
    """Exposed seconds."""

    default: float
    best: float  # of torch's settings
    ours: float

    @classmethod
    def of(cls, model: str, network: Any, ranks: int) -> Paper:
        from lit_fast.distributed import tuning

        arrivals = [gradient.arrival for gradient in gradients(model)]
        sizes = [4.0 * gradient.numel for gradient in gradients(model)]
        seconds = functools.partial(network.all_reduce, ranks=ranks)

        def exposed(ends: Sequence[int]) -> float:
            return tuning.sent_times(arrivals, sizes, ends, seconds)[-1] - arrivals[-1]

        capped = [(first, cap) for cap in CAPS for first in {1, cap}]
        return cls(
            exposed(torch_buckets(sizes, MEBIBYTE, 25 * MEBIBYTE)),
            min(exposed(torch_buckets(sizes, first * MEBIBYTE, cap * MEBIBYTE)) for first, cap in capped),
            exposed(tuning.best_buckets(arrivals, sizes, seconds)),
        )


# ---- a backward that takes the time of a GPU's ----


class TimedBackward:
    """A module `model` whose backward hands out gradients of ones at their times; `last` is when the last one came."""

    def __init__(self, given: Sequence[Gradient]) -> None:
        import torch

        self.last = 0.0
        timed = self
        began = 0.0

        class Arrive(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor, parameter: torch.Tensor, index: int) -> torch.Tensor:
                ctx.save_for_backward(parameter)
                ctx.index = index
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
                from benchmarks.simulated_network import wait_until

                nonlocal began
                if ctx.index == 0:
                    began = time.perf_counter()
                (parameter,) = ctx.saved_tensors
                gradient = torch.ones_like(parameter)
                wait_until(began + given[ctx.index].arrival)
                timed.last = time.perf_counter()
                return grad, gradient, None

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                # Registered in the order of a forward, as layers are.
                sizes = [max(1, gradient.numel // SCALE) for gradient in reversed(given)]
                self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(size)) for size in sizes)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for index, weight in enumerate(self.weights):
                    x = Arrive.apply(x, weight, len(self.weights) - 1 - index)
                return x

        self.model = Model()
        self.x = torch.zeros(1, requires_grad=True)


Step = Callable[[], Any]  # gives the loss, so that letting go of its graph is nobody's time


def torch_step(timed: TimedBackward, *, first: float = 1, cap: float = 25, **options: Any) -> Step:
    """A step of torch's DDP, with buckets of so many MiB of the whole model."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel, distributed

    scaled = mock.patch.multiple(distributed, _DEFAULT_BUCKET_CAP_MB=cap / SCALE)
    with scaled, mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", int(first * MEBIBYTE / SCALE)):
        ddp = DistributedDataParallel(timed.model, **options)

    def step() -> Any:
        loss = ddp(timed.x)
        loss.backward()
        return loss

    return step


def our_step(timed: TimedBackward) -> Step:
    """A step of our buckets, whose sizes are chosen in the first four."""
    from lit_fast.distributed import buckets, learning, timing

    scaled = learning.BucketSizes(*(size // SCALE for size in learning.DEFAULT_SIZES))
    with mock.patch.object(learning, "DEFAULT_SIZES", scaled):
        ours = buckets.GradientBuckets(list(timed.model.parameters()), None)

    def step() -> Any:
        loss = timed.model(timed.x)
        with mock.patch.object(timing, "SCRATCH", timing.SCRATCH // SCALE):
            ours.begin()
            loss.backward()
            ours.finish()
        return loss

    return step


# ---- measuring ----


@dataclass
class Contender:
    timed: TimedBackward
    step: Step

    def exposed(self) -> float:
        """Milliseconds from the last gradient until all are means, in one step."""
        for parameter in self.timed.model.parameters():
            parameter.grad = None
        _loss = self.step()
        return (time.perf_counter() - self.timed.last) * 1e3

    def warm_up(self, steps: int) -> Contender:
        for _ in range(steps):
            self.exposed()
        if any(parameter.grad is None or not parameter.grad.eq(1).all() for parameter in self.timed.model.parameters()):
            raise AssertionError("the mean of equal gradients is not that gradient")
        return self


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other core is the network's
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def best_torch(model: str) -> tuple[Contender, str]:
    """torch's DDP with the options that expose least on the group's network, and these options."""

    def contender(**options: Any) -> Contender:
        timed = TimedBackward(gradients(model))
        return Contender(timed, torch_step(timed, **options)).warm_up(2)

    def figure(one: Contender) -> float:
        return statistics.median(one.exposed() for _ in range(3))

    base: dict[str, Any] = {"cap": 25, "first": 1, "gradient_as_bucket_view": True, "static_graph": True}
    tried = [base | {"cap": cap} for cap in CAPS]
    measured = [(figure(contender(**options)), options) for options in tried]
    chosen = min(measured, key=lambda pair: pair[0])[1]
    others = [{"first": chosen["cap"]}, {"gradient_as_bucket_view": False, "batched_grad_copy": True}]
    measured += [(figure(contender(**chosen | other)), chosen | other) for other in others]
    chosen = min(measured, key=lambda pair: pair[0])[1]
    return contender(**chosen), ", ".join(f"{key}={value}" for key, value in chosen.items())


def measure(model: str, network: str, ranks: int, rounds: int) -> list[Row]:
    from benchmarks import simulated_network
    from benchmarks.simulated_network import INSTANT, NETWORKS

    link = NETWORKS[network]
    with simulated_network.joined(ranks, link, SCALE) as group:
        contenders = {}
        timed = TimedBackward(gradients(model))
        contenders["torch DDP"] = Contender(timed, torch_step(timed)).warm_up(3)
        contenders["torch DDP at its best"], options = best_torch(model)
        timed = TimedBackward(gradients(model))
        contenders["ours"] = Contender(timed, our_step(timed)).warm_up(6)

        def on(network: Any, one: Contender) -> Callable[[], float]:
            def run() -> float:
                group.network = network
                return one.exposed()

            return run

        measures = {name: on(link, one) for name, one in contenders.items()}
        measures |= {f"{name}, instant link": on(INSTANT, one) for name, one in contenders.items()}
        measured = harness.Rounds(measures, rounds)
    where = f"{model}, {network}, {ranks} ranks"
    print(f"{where}: torch DDP's best setting is {options}", flush=True)
    paper = Paper.of(model, link, ranks)
    bound = paper.ours / paper.default
    rows = [Row(f"{where}: exposed, {name}", measured.median(name), "ms") for name in measures]
    rows += [
        Row(f"{where}: exposed, bound", paper.ours * 1e3, "ms"),
        Row(
            f"{where}: exposed, ours / torch DDP",
            measured.ratio("ours", "torch DDP"),
            "x",
            ("<=", 0.8),
        ),
        Row(
            f"{where}: exposed, ours / torch DDP at its best",
            measured.ratio("ours", "torch DDP at its best"),
            "x",
            ("<=", 1.0),
        ),
        Row(f"{where}: exposed, bound / torch DDP on paper", bound, "x"),
    ]
    return rows


def paper_rows() -> list[Row]:
    from benchmarks.simulated_network import NETWORKS

    rows = []
    for model in MODELS:
        for network in NETWORKS.values():
            for ranks in PAPER_RANKS:
                if network.name != "NVLink" or ranks <= 8:
                    paper = Paper.of(model, network, ranks)
                    case = f"on paper, {model}, {network.name}, {ranks} ranks: exposed, ours / torch DDP"
                    rows.append(Row(case, paper.ours / paper.default, "x"))
                    rows.append(Row(f"{case} at its best", paper.ours / paper.best, "x"))
    return rows


def main(argv: Sequence[str]) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--paper", action="store_true", help="the arithmetic alone")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose model, network and ranks contain it")
    options = parser.parse_args(argv)
    options.no_save |= bool(options.only)  # a part is no run
    rows: list[Row] = []
    if not options.paper:
        with one_thread():
            for model in MODELS:
                for network, ranks in MEASURED:
                    if options.only in f"{model}, {network}, {ranks} ranks":
                        rows += measure(model, network, ranks, options.rounds)
    return harness.finish("exposed_communication", "Exposed communication", rows + paper_rows(), options)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
