"""The GPU side: optimizer step, whole training step, logging; times by CUDA events, counts by torch.profiler.

    python -m benchmarks.gpu                 # all of it, some 4 minutes on one GPU
    python -m benchmarks.gpu --max-parameters 1e8 --only optimizer

Bandwidth is compared with this GPU's own device-to-device copy, measured in the same run. Lightning takes
part where this interpreter has it (`lightning` or `pytorch_lightning`).
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row

QUICK = False

# In float32: read p, grad, exp_avg, exp_avg_sq and write all but grad, 4 bytes each. In bfloat16 with float32 masters
# and moments: read grad (2), read and write master and moments (24), write p (2).
ADAMW_BYTES = 28
BATCH, TOKENS = 8, 1024


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    """Time of one call on the GPU's own clock, after a warm-up; the host runs ahead as in training."""
    function()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def copy_gigabytes_per_second() -> float:
    """Read plus written bytes of a device-to-device copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), 20) for _ in range(3))
    return 2 * source.numel() / best / 1e6


# ---- optimizer step ----


def gpt2_like_parameters(total: float, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """About `total` parameters: blocks of 12 width^2 in matrices and vectors, as a GPT has them."""
    width = 768 if total < 3e8 else 2048
    shapes = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    shapes += [(width, 4 * width), (width,), (width,), (width,), (width,), (width,)]
    parameters: list[torch.nn.Parameter] = []
    while sum(p.numel() for p in parameters) < total:
        parameters += [torch.nn.Parameter((torch.randn(shape, device="cuda") * 0.02).to(dtype)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def optimizer_rows(total: float, rounds: int, copy: float) -> list[Row]:
    """AdamW alone, and clip + AdamW, for ours and torch's fused and foreach, interleaved."""
    from lit_fast.optim import adopt

    parameters = gpt2_like_parameters(total)
    count = sum(p.numel() for p in parameters)
    label = f"{count / 1e6:.0f}M"
    steps: dict[str, Callable[[], Any]] = {}

    def clipped(optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for name in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, **{name: True})
        steps[f"torch {name}"] = optimizer.step
        steps[f"clip + torch {name}"] = lambda optimizer=optimizer: clipped(optimizer)
    for case, max_norm in (("ours", None), ("clip + ours", 1.0)):
        adopted = adopt(torch.optim.AdamW(parameters, lr=1e-4, fused=True), max_norm=max_norm)
        assert adopted.compiled, adopted.reason
        steps[case] = adopted.step
    calls = max(3, int(3e9 / count))
    measured = harness.Rounds({k: lambda f=f: milliseconds(f, calls) for k, f in steps.items()}, rounds)
    rows = [Row(f"AdamW {label}, {case}", measured.median(case), "ms") for case in steps]
    for case, base in (("ours", "torch fused"), ("clip + ours", "clip + torch fused")):
        rows.append(Row(f"AdamW {label}, {case} / {base}", measured.ratio(case, base), "x"))
    for case in ("ours", "torch fused"):
        reached = ADAMW_BYTES * count / measured.median(case) / 1e6
        rows.append(Row(f"AdamW {label}, {case}: bandwidth", reached, "GB/s"))
        limit = (">=", 0.92) if case == "ours" and total >= 1e9 else None
        rows.append(Row(f"AdamW {label}, {case}: share of copy", reached / copy, "x", limit))
    for case in ("clip + ours", "clip + torch fused"):
        counts = launches_and_syncs(steps[case])
        rows.append(Row(f"AdamW {label}, {case}: kernel launches", counts[0], "launches"))
        rows.append(Row(f"AdamW {label}, {case}: host syncs", counts[1], "syncs"))
    return rows


def master_rows(total: float, rounds: int, copy: float) -> list[Row]:
    """AdamW on bfloat16 parameters and gradients with float32 masters and moments."""
    from lit_fast.optim import AdamW, adopt

    parameters = gpt2_like_parameters(total, torch.bfloat16)
    count = sum(p.numel() for p in parameters)
    adopted = adopt(AdamW(parameters, lr=1e-4, state_dtype="float32", master="float32"))
    assert adopted.compiled, adopted.reason
    calls = max(3, int(3e9 / count))
    measured = harness.Rounds({"ours": lambda: milliseconds(adopted.step, calls)}, rounds)
    name, reached = f"AdamW {count / 1e6:.0f}M, bfloat16 + master", ADAMW_BYTES * count / measured.median("ours") / 1e6
    return [
        Row(name, measured.median("ours"), "ms"),
        Row(f"{name}: bandwidth", reached, "GB/s"),
        Row(f"{name}: share of copy", reached / copy, "x", (">=", 0.92)),
    ]


def scaled_rows(total: float, rounds: int) -> list[Row]:
    """What follows a scaled backward: unscale, finite or not, norm, clip, AdamW."""
    from lit_fast.optim import adopt

    parameters = gpt2_like_parameters(total)
    count = sum(p.numel() for p in parameters)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    scaler.scale(torch.zeros((), device="cuda"))
    theirs = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def by_torch() -> None:
        scaler.unscale_(theirs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(theirs)
        scaler.update()

    own = torch.amp.GradScaler("cuda", init_scale=2.0)
    own.scale(torch.zeros((), device="cuda"))
    scaled = adopt(torch.optim.AdamW(parameters, lr=1e-4, fused=True), max_norm=1.0, scaler=own)
    adopted = adopt(torch.optim.AdamW(parameters, lr=1e-4, fused=True), max_norm=1.0, nonfinite="skip")
    assert adopted.compiled and scaled.compiled, adopted.reason
    inverse = torch.full((), 0.5, device="cuda")

    def by_ours() -> None:
        scaled.step()
        own.update()

    steps = {"ours": by_ours, "ours, scale given": lambda: adopted.step(grad_scale=inverse), "torch": by_torch}
    calls = max(3, int(3e9 / count))
    measured = harness.Rounds({k: lambda f=f: milliseconds(f, calls) for k, f in steps.items()}, rounds)
    name = f"AdamW {count / 1e6:.0f}M, unscale + finite + norm + clip + step"
    rows = [Row(f"{name}, {case}", measured.median(case), "ms") for case in steps]
    rows.append(Row(f"{name}, torch fused / ours", measured.ratio("torch", "ours"), "x", (">=", 1.5)))
    # What else the scaler and its step launch is of one number each: the inverse of the scale, whether to move it.
    launches, _ = launches_and_syncs(steps["ours, scale given"])
    _, syncs = launches_and_syncs(by_ours)
    return [*rows, Row(f"{name}: launches", launches, "", ("<=", 3)), Row(f"{name}: host syncs", syncs, "", ("<=", 0))]


def launches_and_syncs(function: Callable[[], Any]) -> tuple[int, int]:
    """Kernels that ran, and waits of the host for the device, in one call."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
    events = recorded.events()
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(not name.startswith(("Memcpy", "Memset", "Optimizer.step")) for name in on_device)
    # The profiler itself waits once, for the whole device, when it stops.
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy") for event in events)
    return launches, waits


# ---- whole training step ----


class Tokens(torch.utils.data.IterableDataset[torch.Tensor]):
    """`count` batches of random token ids (BATCH, TOKENS + 1), ready on the host."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.batches = torch.randint(0, 50257, (8, BATCH, TOKENS + 1))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.batches[index % 8] for index in range(self.count))


class GPT2(torch.nn.Module):
    """GPT-2's 124M shapes in plain torch, so that every contender trains the same module."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, vocabulary: int = 50304) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Embedding(TOKENS, width)
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(width)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(TOKENS)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        ids, targets = batch[:, :-1], batch[:, 1:]
        x = self.tokens(ids) + self.places.weight
        x = self.norm(self.blocks(x, mask=self.mask, is_causal=True))
        logits = torch.nn.functional.linear(x, self.tokens.weight)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def eager_steps(count: int) -> None:
    """The hand-written loop: bf16 autocast, clip to norm 1, fused AdamW; the loss is read at the end only."""
    model = GPT2().cuda()
    optimizer = adamw(model.parameters())
    for batch in torch.utils.data.DataLoader(Tokens(count), batch_size=None, pin_memory=True):
        ids = batch.cuda(non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.cuda.synchronize()


def trainer_steps(package: Any, count: int, root: str, logged: int = 1) -> None:
    """The same under a trainer with progress bar, CSV logger and `logged` values a step."""

    class Model(package.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(batch)
            for index in range(logged):
                self.log(f"loss_{index}", loss, prog_bar=index == 0)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.parameters())

    loggers = importlib.import_module(f"{package.__name__}.loggers")
    trainer = package.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=loggers.CSVLogger(root),
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(Tokens(count), batch_size=None, pin_memory=True))
    torch.cuda.synchronize()


def lightning_package() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return importlib.import_module(name)
    return None


def slope_ms(run: Callable[[int], None], count: int) -> Callable[[], float]:
    def measure() -> float:
        times = []
        for steps in (count, 3 * count):
            gc.collect()
            torch.cuda.empty_cache()
            start = time.perf_counter()
            run(steps)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (2 * count) * 1e3

    return measure


def step_rows(rounds: int, count: int) -> list[Row]:
    import lit_fast.pytorch

    theirs = lightning_package()
    with tempfile.TemporaryDirectory() as root:
        runs: dict[str, Callable[[int], None]] = {
            "eager loop": eager_steps,
            "lit_fast": lambda n: trainer_steps(lit_fast.pytorch, n, root),
            "lit_fast, 10 values logged": lambda n: trainer_steps(lit_fast.pytorch, n, root, logged=10),
        }
        if theirs is not None:
            runs["Lightning"] = lambda n: trainer_steps(theirs, n, root)
        measured = harness.Rounds({case: slope_ms(run, count) for case, run in runs.items()}, rounds)
    rows = [Row(f"GPT-2 124M, {BATCH} x {TOKENS} tokens, {case}", measured.median(case), "ms") for case in runs]
    rows += [Row(f"GPT-2 124M, {case} / eager loop", measured.ratio(case, "eager loop"), "x") for case in runs]
    tokens = BATCH * TOKENS / measured.median("lit_fast")
    rows.append(Row("GPT-2 124M, lit_fast: tokens", tokens * 1e3, "per s"))
    return rows


# ---- logging without a sync ----


def sync_rows() -> list[Row]:
    """`self.log` of a CUDA tensor inside training_step, with torch refusing every host sync there."""
    import lit_fast

    refused: list[str] = []

    class Model(lit_fast.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).sum()
            torch.cuda.set_sync_debug_mode("error")
            try:
                self.log("default", loss)
                self.log("bar", loss, prog_bar=True)
                self.log("both", loss, on_step=True, on_epoch=True)
                self.log("maximum", loss, on_step=False, on_epoch=True, reduce_fx="max")
            except RuntimeError as error:
                refused.append(str(error))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.parameters())

    with tempfile.TemporaryDirectory() as root:
        trainer = lit_fast.Trainer(
            accelerator="gpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(200, 4, 32), batch_size=None))
    return [Row("steps of 200 in which self.log waited for the GPU", len(refused), "steps", ("<=", 0))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--only", choices=("optimizer", "step", "log"), help="one part")
    parser.add_argument("--max-parameters", type=float, default=1e9, help="largest optimizer case")
    parser.add_argument("--steps", type=int, default=20, help="N of the whole step's slope between N and 3N")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and torch sees none")
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    if options.only in (None, "optimizer"):
        copy = copy_gigabytes_per_second()
        rows.append(Row("device-to-device copy, read + write", copy, "GB/s"))
        for total in (1.2e8, 3.5e8, 1e9):
            if total <= options.max_parameters:
                rows += optimizer_rows(total, options.rounds, copy)
                gc.collect()
                torch.cuda.empty_cache()
        largest = min(1e9, options.max_parameters)
        rows += master_rows(largest, options.rounds, copy)
        gc.collect()
        rows += scaled_rows(largest, options.rounds)
    if options.only in (None, "step"):
        rows += step_rows(options.rounds, options.steps)
    if options.only in (None, "log"):
        rows += sync_rows()
    package = lightning_package()
    version = "" if package is None else str(package.__version__)
    return harness.finish("gpu", f"On {torch.cuda.get_device_name()}", rows, options, version)


if __name__ == "__main__":
    sys.exit(main())
