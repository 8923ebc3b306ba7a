"""What a pretraining run shows: speed on the bar, loss curve, and where the time of its steps went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_fast.callbacks.callback import Callback

if TYPE_CHECKING:
    from rich.table import Table

# The profiler's phases in the table's order; those of one name share a row, one not listed keeps its name.
PHASES = {
    "setup": "setup",
    "data": "data",
    "transfer": "transfer",
    "forward": "forward",
    "backward": "backward",
    "communication": "communication",
    "optimizer": "optimizer",
    "schedulers": "learning-rate schedule",
    "hooks": "hooks and logging",
    "logging": "hooks and logging",
    "checkpoint": "checkpoint",
    "validation": "validation",
    "loop": "loop",
    "idle": "idle",
    "unexplained": "unexplained",
}


class PretrainMonitor(Callback):
    """Puts tokens/s and MFU on the progress bar, keeps the loss curve, saves at the last step.

    Its state goes into checkpoints, so that the curve of a resumed run is whole.

    Args:
        checkpoint: where the checkpoint of the last step is written.
        every: batches between two points of the curve, and between two readings of the speed.
        flops_per_token: model FLOPs of a token; with `peak_flops` (FLOP/s of the device) it gives the MFU.
        peak_flops: None where the device's peak is not known: no MFU then.
    """

    reads_gradients = False

    def __init__(self, checkpoint: Path, every: int, flops_per_token: int = 0, peak_flops: float | None = None) -> None:
        self.checkpoint, self.every = checkpoint, max(1, every)
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.train_curve: list[tuple[int, Tensor | float]] = []
        self.val_curve: list[tuple[int, float]] = []
        self.first_loss: Tensor | float | None = None
        self.tokens = 0  # of this process, not of the run before a resume
        self.first_step = 0  # where this process began
        self._since = (0.0, 0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = (time.perf_counter(), self.tokens)
        self.first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += batch.shape[0] * (batch.shape[1] - 1)
        if self.first_loss is None or (batch_idx + 1) % self.every == 0:
            self._read(trainer, pl_module, outputs)
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.checkpoint)

    def _read(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        # The loss stays a tensor until somebody draws or saves it: reading it here would make the host wait.
        loss = (outputs["loss"] if isinstance(outputs, Mapping) else outputs).detach()
        if self.first_loss is None:
            self.first_loss = loss
        self.train_curve.append((trainer.global_step, loss))
        now, (then, tokens) = time.perf_counter(), self._since
        speed = (self.tokens - tokens) / max(now - then, 1e-9)
        self._since = (now, self.tokens)
        pl_module.log("tokens/s", speed, prog_bar=True)
        if self.peak_flops:
            pl_module.log("mfu_percent", 100 * speed * self.flops_per_token / self.peak_flops, prog_bar=True)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.val_curve.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))
        self._since = (time.perf_counter(), self.tokens)

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_curve": [[step, float(loss)] for step, loss in self.train_curve],
            "val_curve": [[step, loss] for step, loss in self.val_curve],
            "first_loss": None if self.first_loss is None else float(self.first_loss),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_curve = [(int(step), loss) for step, loss in state_dict["train_curve"]]
        self.val_curve = [(int(step), loss) for step, loss in state_dict["val_curve"]]
        self.first_loss = state_dict["first_loss"]


def phase_rows(phases: Mapping[str, float], wall: float) -> list[tuple[str, float]]:
    """(name, seconds) of every phase in the order of a step; the rows add up to `wall`.

    What `phases` leaves of `wall` is a last row, "unexplained".

    Example:
        >>> phase_rows({"backward": 2.0, "forward": 1.0}, wall=4.0)
        [('forward', 1.0), ('backward', 2.0), ('unexplained', 1.0)]
    """
    rows: dict[str, float] = {}
    for phase in [*PHASES, *(phase for phase in phases if phase not in PHASES)]:
        if phases.get(phase):
            name = PHASES.get(phase, phase)
            rows[name] = rows.get(name, 0.0) + phases[phase]
    rest = wall - sum(rows.values())
    # Below a microsecond it is rounding of the sum.
    return list(rows.items()) if abs(rest) < 1e-6 else [*rows.items(), ("unexplained", rest)]


def phase_table(phases: Mapping[str, float], wall: float, steps: int) -> Table:
    """Where the wall time of `steps` steps went, as a table with one row a phase and their sum."""
    from rich.table import Table

    table = Table(title="Where the time went")
    for column in ("", "seconds", "ms a step", "share"):
        table.add_column(column, justify="left" if not column else "right")
    rows = phase_rows(phases, wall)
    for name, seconds in rows:
        table.add_row(name, f"{seconds:.3f}", f"{1e3 * seconds / max(1, steps):.3f}", f"{seconds / wall:.1%}")
    table.add_section()
    total = sum(seconds for _, seconds in rows)
    table.add_row("total (wall)", f"{total:.3f}", f"{1e3 * total / max(1, steps):.3f}", f"{total / wall:.1%}")
    return table


def draw_loss_curve(
    path: Path,
    train: Sequence[tuple[int, Tensor | float]],
    val: Sequence[tuple[int, float]],
    bigram_loss: float | None = None,
) -> None:
    """Write training and validation loss (nats a token) over optimizer steps as a PNG; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([step for step, _ in train], [float(loss) for _, loss in train], linewidth=1, label="training")
    if val:
        axes.plot([step for step, _ in val], [loss for _, loss in val], "o-", label="validation")
    if bigram_loss is not None:
        axes.axhline(bigram_loss, linestyle="--", color="gray", label="bigram, validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)
