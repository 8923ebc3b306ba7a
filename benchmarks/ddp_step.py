"""A step of two processes on this machine, over Gloo: our `ddp` against torch's DDP, and what each adds to a backward.

Two models: a small GPT, and 75 linear layers of 150 small parameters, where nothing counts but what happens for each
parameter and bucket. torch's DDP runs in a loop written by hand, and under our Trainer (`ddp_torch`), where all but the
reducer is the same. All run in the same two processes, one after the other in each round.

What a reducer adds to a backward is measured in one process, in a Gloo group of its own alone: nothing is waited for.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT, Row, Time

QUICK = False
UNTIMED = 8  # steps: buckets are settled after the seventh
MODELS = ("small GPT", "150 parameters")
HAND, OURS, TORCHS = "torch DDP, loop by hand", "ours", "torch DDP under our Trainer"
STEPS = {"small GPT": 12, "150 parameters": 30}


class Batches:
    """The same batches in every run; `stamps` are when those of the timed steps began and ended."""

    def __init__(self, batches: Sequence[Any], steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.stamps: list[Time] = []

    def __len__(self) -> int:
        return UNTIMED + self.steps + 1

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            if index in (UNTIMED, UNTIMED + self.steps):
                self.stamps.append(Time.now())
            yield self.batches[index % len(self.batches)]

    @property
    def step(self) -> Time:
        """Milliseconds of one."""
        return self.stamps[0].slope(self.stamps[1], 1, 1e3 / self.steps)


def make(model: str) -> tuple[Any, list[Any]]:
    """A module of that name, and batches."""
    import torch
    from torch import nn

    import lit_fast
    from lit_fast.models.gpt import GPT

    torch.manual_seed(0)
    if model == "small GPT":

        class SmallGPT(GPT):
            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters())

        tokens = torch.randint(256, (4, 4, 65), generator=torch.Generator().manual_seed(1))
        small = SmallGPT(vocab_size=256, block_size=64, num_layers=4, num_heads=4, embedding_dim=128)
        return small, list(tokens)

    class Layers(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(16, 16) for _ in range(75)])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    return Layers(), list(torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1)))


# ---- steps of two processes ----


def by_hand(model: str, steps: int) -> Time:
    import torch
    from torch import nn

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            module.log = lambda *_, **__: None

        def forward(self, batch: Any) -> Any:
            loss = module.training_step(batch, 0)
            return loss["loss"] if isinstance(loss, dict) else loss

    module, batches = make(model)
    data = Batches(batches, steps)
    ddp = nn.parallel.DistributedDataParallel(Loss())
    optimizer = torch.optim.AdamW(module.parameters())
    for batch in data:
        optimizer.zero_grad()
        ddp(batch).backward()
        optimizer.step()
    return data.step


def fitted(model: str, steps: int, strategy: str) -> Time:
    import lit_fast

    module, batches = make(model)
    data = Batches(batches, steps)
    trainer = lit_fast.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert trainer.global_step == len(data)
    return data.step


def two_processes(rounds: int, only: str) -> None:
    """What each of the two runs; the first one prints the figures."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    figures: dict[str, dict[str, list[Time]]] = {}
    for model in filter(lambda name: only in name, MODELS):

        def measure(run: Callable[..., Time], *options: Any, model: str = model) -> Callable[[], Time]:
            def measured() -> Time:
                dist.barrier()
                return run(model, STEPS[model], *options)

            return measured

        cases = {HAND: measure(by_hand), OURS: measure(fitted, "ddp"), TORCHS: measure(fitted, "ddp_torch")}
        figures[model] = harness.Rounds(cases, rounds).figures
    if dist.get_rank() == 0:
        Path(os.environ["FIGURES"]).write_text(json.dumps(figures))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def step_rows(rounds: int, only: str = "") -> list[Row]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "said").open("w+") as said:
        figures = Path(folder, "figures.json")
        common = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "FIGURES": str(figures),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ddp_step", "--worker", f"--rounds={rounds}", f"--only={only}"],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=said,
                stderr=said,
            )
            for rank in range(2)
        ]
        try:
            deadline = time.monotonic() + 600
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):  # the other one would wait for it
                    break
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if codes != [0, 0]:
            raise SystemExit(f"{Path(said.name).read_text()}\nthe two processes ended with {codes}")
        found = json.loads(figures.read_text())
    rows = []
    for model, cases in found.items():
        measured = harness.Rounds({}, 0, warmup=0)
        measured.figures = {case: [Time(*figure) for figure in times] for case, times in cases.items()}
        rows += [Row(f"{model}, 2 processes, {case}: time of a step", measured.median(case), "ms") for case in cases]
        for base in (HAND, TORCHS):
            case = f"{model}, 2 processes: a step, ours / {base}"
            rows.append(Row(case, measured.ratio(OURS, base), "x", ("<=", 1.0)))
            rows.append(Row(f"{case}, processor time", measured.ratio(OURS, base, cpu=True), "x"))
    return rows


# ---- what is added to a backward ----


def reducers(model: str) -> dict[str, Any]:
    """For each case a step without an optimizer, of a module of its own, and how many buckets it has."""
    from torch import nn

    from lit_fast.distributed.buckets import GradientBuckets
    from lit_fast.distributed.learning import DEFAULT_SIZES

    def fresh() -> tuple[Any, list[Any], Any]:
        module, batches = make(model)
        return module.layers, list(module.parameters()), batches[0]

    def alone() -> Callable[[], None]:
        layers, parameters, batch = fresh()

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            layers(batch).square().mean().backward()

        return step

    def torchs(**options: Any) -> Callable[[], None]:
        layers, parameters, batch = fresh()
        ddp = nn.parallel.DistributedDataParallel(layers, **options)

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            ddp(batch).square().mean().backward()

        return step

    def ours() -> Callable[[], None]:
        layers, parameters, batch = fresh()
        buckets = GradientBuckets(parameters, None, sizes=DEFAULT_SIZES)

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            loss = layers(batch).square().mean()
            buckets.begin()
            loss.backward()
            buckets.finish()

        return step

    return {
        "nothing": alone(),
        "torch DDP": torchs(),
        "torch DDP, gradients as bucket views": torchs(gradient_as_bucket_view=True, static_graph=True),
        "ours": ours(),
    }


def operators(step: Callable[[], None]) -> int:
    """How many of torch's operators run in a step, which on a GPU are launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return sum(event.count for event in profiled.key_averages() if event.key.startswith(("aten::", "c10d::", "gloo:")))


def added_rows(rounds: int) -> list[Row]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps = reducers("150 parameters")

    def many(step: Callable[[], None], count: int) -> Callable[[], Time]:
        def measured() -> Time:
            begin = Time.now()
            for _ in range(count):
                step()
            return begin.slope(Time.now(), count, 1e6)

        return measured

    for step in steps.values():
        many(step, 10)()  # buckets are settled
    measured = harness.Rounds({name: many(step, 40) for name, step in steps.items()}, 3 * rounds)
    counts = {name: operators(step) for name, step in steps.items()}
    dist.destroy_process_group()
    rows = []
    for name in list(steps)[1:]:
        case = f"150 parameters, one bucket, added to a backward by {name}"
        rows.append(Row(f"{case}: processor time", measured.difference(name, "nothing", cpu=True), "us"))
        calls = counts[name] - counts["nothing"] + (name == "ours")  # our kernel is none of torch's
        limit = ("<=", 3.0) if name == "ours" else None
        rows.append(Row(f"{case}: operators and kernels", calls, "calls", limit))
    cost = [measured.difference(name, "nothing", cpu=True) for name in ("ours", "torch DDP")]
    case = "150 parameters: processor time added to a backward, ours / torch DDP"
    rows.append(Row(case, cost[0] / cost[1], "x", ("<=", 1.0)))
    return rows


def main(argv: Sequence[str]) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--worker", action="store_true", help="one of the two processes")
    parser.add_argument("--only", metavar="TEXT", default="", help="models whose name contains it")
    options = parser.parse_args(argv)
    options.no_save |= bool(options.only)  # a part is no run
    if options.worker:
        two_processes(options.rounds, options.only)
    rows = step_rows(options.rounds, options.only)
    if options.only in "150 parameters":
        rows += added_rows(options.rounds)
    return harness.finish("ddp_step", "A step of two processes", rows, options)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
