"""Profiles as real runs give them, without a run: for tests of what is made of them.

A step of `profile()` takes about 10 ms and nothing about it is remarkable; a test makes one thing so.
"""

from __future__ import annotations

import math

from lit_fast.profiler.record import (
    Ceilings,
    Compared,
    Comparison,
    Device,
    Distribution,
    Header,
    Kernel,
    Memory,
    MemorySample,
    Part,
    Phase,
    Profile,
    Reading,
    SlowStep,
    Span,
    Sync,
)

# s a step: 10 ms together
PHASES = {
    "data": 0.10e-3,
    "transfer": 0.05e-3,
    "forward": 3.20e-3,
    "backward": 5.20e-3,
    "optimizer": 1.20e-3,
    "schedulers": 0.01e-3,
    "hooks": 0.08e-3,
    "logging": 0.06e-3,
    "checkpoint": 0.04e-3,
    "unexplained": 0.06e-3,
}


def jitter(number: int) -> float:
    """A factor about 1, the same in every run; its mean over 200 steps is 1.005, two of them being slow."""
    return 1.0 + 0.04 * math.sin(12.9898 * number) + (0.5 if number % 97 == 96 else 0.0)


def distribution(seconds: float, count: int) -> Distribution:
    made = Distribution()
    for number in range(count):
        made.add(seconds * jitter(number))
    return made


def profile(steps: int = 200, rank: int = 0, world_size: int = 1, spans: int = 8, **seconds_per_step: float) -> Profile:
    """`seconds_per_step` by phase, in place of the ordinary ones. `spans`: steps on the timeline."""
    per_step = {**PHASES, **seconds_per_step}
    if world_size > 1:
        per_step.setdefault("communication", 0.2e-3)
    rows = [Phase(name, seconds * steps, steps, distribution(seconds, steps)) for name, seconds in per_step.items()]
    step = sum(per_step.values())
    slowest = sorted(range(steps), key=lambda number: -jitter(number))[:10]
    made = Profile(
        header=Header(
            started="2026-11-20T09:30:00+00:00",
            script="train.py",
            commit="0123abc",
            host=f"node-{rank // 8}",
            pid=4000 + rank,
            rank=rank,
            local_rank=rank % 8,
            world_size=world_size,
            device="cpu",
            processor="AMD EPYC 7763",
            cores=16,
            versions={"python": "3.11.2", "torch": "2.13.0", "lit_fast": "0.1.0"},
            module="GPT",
            parameters=10_800_000,
            precision="32-true",
            strategy="ddp" if world_size > 1 else "auto",
            optimizer="AdamW: compiled step (adamw on avx2)",
            batch="int64[16, 257]",
            samples_per_step=16.0,
            tokens_per_step=4096.0,
            flops_per_step=2.8e11,
        ),
        wall=sum(row.seconds for row in rows),
        finished=True,
        steps=distribution(step, steps),
        phases=rows,
        parts=[
            Part(
                "hooks", "[Callback]TQDMProgressBar.on_train_batch_end", 0.05e-3 * steps, steps, "tqdm_progress.py:80"
            ),
            Part("hooks", "[LightningModule]GPT.on_train_batch_start", 0.02e-3 * steps, steps, "train.py:31"),
            Part("checkpoint", "ModelCheckpoint", per_step["checkpoint"] * steps, 4, "model_checkpoint.py:200"),
        ],
        slowest=[
            SlowStep(
                number,
                step * jitter(number),
                {name: seconds * jitter(number) for name, seconds in per_step.items()},
                ["garbage collection 3 ms"] if number == 96 else [],
                number * step,
            )
            for number in slowest
        ],
        own_cost=1.8e-6,
    )
    made.clock_check = made.wall
    made.timeline = timeline(per_step, first=steps - spans, count=spans)
    return made


def timeline(per_step: dict[str, float], first: int, count: int) -> list[Span]:
    """Steps one after another, phases within, a hook within the phase of hooks."""
    spans, at = [], first * sum(per_step.values())
    for step in range(first, first + count):
        for name, seconds in per_step.items():
            if name == "unexplained":
                at += seconds
                continue
            spans.append(Span("phases", name, at, seconds, step))
            if name == "hooks":
                spans.append(Span("hooks", "[Callback]EarlyStopping.on_train_batch_end", at, seconds / 2, step))
            if name == "backward":
                spans += [Span("collectives", f"bucket {b}", at + seconds * b / 4, seconds / 5, step) for b in range(4)]
            at += seconds
    return spans


def deep(made: Profile | None = None) -> Profile:
    """With everything that a window in depth on a GPU gives."""
    made = made or profile()
    mebi = 1 << 20
    made.header.mode, made.header.device, made.header.driver = "deep", "NVIDIA H200", "570.86"
    made.header.peak_flops, made.header.peak_source = 989e12, "NVIDIA's data sheet, bfloat16, dense"
    made.window_steps = 10
    made.overlapped = 0.4
    made.syncs = [Sync("train.py:42", "if loss.item() > 10:", 1, 0.05e-3)]
    made.kernels = [
        Kernel("lit_fast: adamw float32", 10, 0.011, 3.0e10, 2.2e9, 0.1e-3, "memory", 10),
        Kernel("sm90_xmma_gemm_bf16bf16_bf16f32_tn", 480, 0.030, 1.5e10, 1.4e13, 0.6e-3, "compute", 10),
        Kernel("flash_fwd_kernel<bf16, 64>", 120, 0.008, 4.0e9, 1.1e12, 0.5e-3, "compute", 10),
        Kernel("layer_norm_kernel", 240, 0.004, 1.0e10, 2.0e10, 0.15e-3, "memory", 10),
        Kernel("elementwise_kernel<gelu>", 240, 0.003, 0.9e10, 0.9e10, 0.1e-3, "memory", 10),
        Kernel("Memcpy HtoD", 10, 0.0004, steps=10),
    ]
    made.ceilings = Ceilings(4.0e12, {"bfloat16": 7.2e14, "float32": 5.1e13}, "median of 20 copies and products")
    curve = [
        ("step begins", 0),
        ("forward", 300),
        ("forward", 1100),
        ("backward", 1200),
        ("backward", 500),
        ("step", 0),
    ]
    made.memory = Memory(
        over_step=[
            MemorySample(
                at=2e-3 * number,
                point=point,
                parameters=43 * mebi,
                gradients=43 * mebi if number >= 3 else 0,
                optimizer=86 * mebi,
                activations=activations * mebi,
                other=12 * mebi,
            )
            for number, (point, activations) in enumerate(curve)
        ],
        peak=1384 * mebi,
        peak_owner="activations",
        reserved=1600 * mebi,
        allocator_retries=0,
        host_resident=2100 * mebi,
    )
    made.devices = [
        Device(
            "NVIDIA H200",
            [
                Reading("power", "W", 512.0, 110.0, 698.0, 40),
                Reading("sm clock", "MHz", 1905.0, 1200.0, 1980.0, 40),
                Reading("temperature", "°C", 61.0, 44.0, 68.0, 40),
            ],
            energy=1024.0,
            energy_seconds=made.wall,
        )
    ]
    made.header.notes = ["SM activity: NVML offers it to root only here"]
    return made


def comparison() -> Comparison:
    return Comparison(
        against="eager",
        rows=[
            Compared("forward", 3.3e-3, 3.2e-3, 0.970, 0.955, 0.986),
            Compared("backward", 5.4e-3, 5.2e-3, 0.963, 0.950, 0.978),
            Compared("optimizer", 2.0e-3, 1.2e-3, 0.600, 0.570, 0.640),
            Compared("step", 11.2e-3, 10.0e-3, 0.893, 0.880, 0.907),
        ],
        windows=12,
        steps=20,
        largest_loss_difference=3e-7,
        loss_bound=1e-5,
    )
