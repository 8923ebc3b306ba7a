"""Tokens/s of the main job's model under the Trainer, against the same model in a hand-written eager loop.

Two ways of comparing, because the Trainer tells the CPU's allocator to keep freed memory, and that holds for
a whole process (`mallopt`; `Trainer(keep_freed_memory=False)` leaves it alone):

- one process, rounds in turn: the first fit has set the allocator for the eager loop, too, so this is what
  the compiled step alone gives;
- two processes, rounds in turn, one idle while the other works: the eager loop has the allocator that any
  script has, so this is what moving from a hand-written loop to the Trainer gives: what is promised.

The eager loop is what a user writes: `AdamW` in the model's parameter groups, `LambdaLR`, `clip_grad_norm_`,
the same DataLoader. The Trainer has its CSV log, `self.log` with a progress value and the schedule on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.harness import ROOT, Rounds, Row, Time, arguments, finish

QUICK = True
# steps a round, first steps of a round that are not timed (allocation of gradients and optimizer state)
STEPS = {"tiny": (60, 5), "gpt2-124m": (3, 2)}
GPT2_TOKENS = 256


def build(name: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """(makes the model, makes its loader, tokens a step) of `tiny` (the main job's) or `gpt2-124m`."""
    import torch
    from torch.utils.data import DataLoader

    from lit_fast.cli.pretrain import parse
    from lit_fast.data.tokens import keep_batch, prepare_tokens
    from lit_fast.models import GPT

    if name == "tiny":
        settings = parse(["--preset=tiny"])
        data = prepare_tokens(None, vocab_size=settings.vocab_size, val_fraction=settings.val_fraction)
        options = settings.model.init_args.as_dict()
        block_size, batch_size = options["block_size"], settings.batch_size
        rows = -(-settings.vocab_size // 64) * 64
        return (
            lambda: GPT(vocab_size=rows, total_steps=settings.trainer.max_steps, **options),
            lambda: data.dataloader("train", block_size, batch_size),
            block_size * batch_size,
        )
    tokens = torch.randint(0, 50257, (64, GPT2_TOKENS + 1), generator=torch.Generator().manual_seed(0))
    # Slices of one tensor: a loader that costs as little as the main job's.
    loader = DataLoader([row[None] for row in tokens], batch_size=None, shuffle=True, collate_fn=keep_batch)
    return GPT, lambda: loader, GPT2_TOKENS


def eager_round(name: str) -> Callable[[], Time]:
    """A hand-written loop that goes on where it was; each call gives the seconds a token of one round."""
    import torch

    make_model, make_loader, tokens = build(name)
    torch.manual_seed(0)
    model = make_model()
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    model.train()

    def run() -> Time:
        steps, warmup = STEPS[name]
        began = Time.now()
        for step, batch in enumerate(make_loader()):
            if step == warmup:
                began = Time.now()
            if step == warmup + steps:
                break
            optimizer.zero_grad()
            loss = model.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        return began.slope(Time.now(), steps * tokens, 1.0)

    return run


def trainer_round(name: str) -> Callable[[], Time]:
    """The same model under the Trainer; each call is one short fit and gives its seconds a token."""
    import torch

    from lit_fast import Callback, Trainer
    from lit_fast.loggers import CSVLogger

    make_model, make_loader, tokens = build(name)
    steps, warmup = STEPS[name]
    torch.manual_seed(0)
    model = make_model()

    class Clock(Callback):
        reads_gradients = False
        began = ended = Time(0.0, 0.0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 == warmup:
                self.began = Time.now()
            self.ended = Time.now()

    def run() -> Time:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                max_steps=warmup + steps,
                gradient_clip_val=1.0,
                logger=CSVLogger(folder),
                log_every_n_steps=25,
                limit_val_batches=0,
                callbacks=clock,
                accelerator="cpu",
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(model, make_loader())
        return clock.began.slope(clock.ended, steps * tokens, 1.0)

    return run


ROUNDS_OF = {"eager": eager_round, "trainer": trainer_round}


class Worker:
    """A process of its own that measures one round for every line it is sent."""

    def __init__(self, loop: str, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pretrain", "--worker", loop, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )

    def __call__(self) -> Time:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("time "):
                return Time(*map(float, line.split()[1:]))
        raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")  # type: ignore[union-attr]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(loop: str, name: str) -> int:
    run = ROUNDS_OF[loop](name)
    for _ in sys.stdin:
        print("time", *run(), flush=True)
    return 0


def measure(name: str, rounds: int, promise: tuple[str, float]) -> list[Row]:
    workers = {loop: Worker(loop, name) for loop in ROUNDS_OF}
    try:
        apart = Rounds(workers, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    together = Rounds({loop: make(name) for loop, make in ROUNDS_OF.items()}, rounds)
    rows = [Row(f"{name}: {loop}", 1 / apart.median(loop), "tokens/s") for loop in ROUNDS_OF]
    for how, made, kept in (("own processes", apart, promise), ("one process", together, None)):
        faster = f"{name}: faster than eager, {how}"
        rows.append(Row(faster, made.ratio("eager", "trainer"), "x", kept))
        rows.append(Row(f"{faster}, processor time", made.ratio("eager", "trainer", cpu=True), "x"))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--worker", nargs=2, metavar=("LOOP", "MODEL"), help="used by the benchmark itself")
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=list(STEPS))
    options = parser.parse_args(argv)
    if options.worker:
        return serve(*options.worker)
    promises = {"tiny": (">=", 1.05), "gpt2-124m": (">=", 1.2)}
    rows = [row for name in options.models for row in measure(name, options.rounds, promises[name])]
    return finish("pretrain", "Pretraining: tokens/s under the Trainer and in an eager loop", rows, options)


if __name__ == "__main__":
    raise SystemExit(main())
