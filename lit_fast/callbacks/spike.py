"""Stop training at the first loss that leaps away from its running mean, and note which batches to leave out."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException, TrainingSpikeException


class LossSpikes:
    """Watches a loss, batch by batch, for a trainer of any kind (`lightning.fabric.utilities.spike.SpikeDetection`).

    A loss is a spike if it is worse than the one before it, and further away from the mean of the last `window` losses
    than both `atol` and `rtol` times that mean; a loss that is NaN or infinite always is, with `finite_only`. The batch
    and the one before it, which may have spoilt the weights, are written to a file as a JSON list of their indices.

    Args:
        mode: "min" where a smaller loss is better, "max" where a larger one is.
        window: losses in the running mean.
        warmup: the first batch that can be a spike.
        atol: least distance from the mean; None: any.
        rtol: least distance as a multiple of the mean; None: any.
        exclude_batches_path: a file that ends in ".json", or the directory of "skip_batches.json"; None: the working
            directory.
        finite_only: NaN and infinity are spikes too. Where False they are left out of the mean.

    Raises:
        MisconfigurationException: another mode, or a window below 1.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"SpikeDetection(mode={mode!r}): allowed are 'min' and 'max'.")
        if window < 1:
            raise MisconfigurationException(f"SpikeDetection(window={window}): a mean needs at least 1 loss.")
        self.mode = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.finite_only = finite_only
        self.exclude_batches_path = exclude_batches_path
        self.bad_batches: list[int] = []
        self.last_val = 0.0
        self.running: deque[float] = deque(maxlen=window)

    def on_train_batch_end(self, fabric: Any, loss: Tensor, batch: Any, batch_idx: int) -> None:
        """Look at the loss of one batch.

        Raises:
            TrainingSpikeException: it is a spike, here or in another process.
        """
        value = float(loss.detach())  # whether to go on is decided on the host: it waits for the device here
        spike = batch_idx >= self.warmup and self._is_spike(value)
        seen = torch.tensor([spike, not math.isfinite(value)], dtype=torch.float32)  # one message for both questions
        spikes, others = fabric.strategy.reduce(seen, reduce_op="sum").tolist()
        if spikes:
            self._write_bad_batches(batch_idx, write=fabric.global_rank == 0)
            raise TrainingSpikeException(batch_idx)
        if self.finite_only or not others:
            self.running.append(value)
            self.last_val = value

    @property
    def running_mean(self) -> float:
        """Mean of the last losses that are numbers; NaN where there is none."""
        numbers = [value for value in self.running if not math.isnan(value)]
        return sum(numbers) / len(numbers) if numbers else math.nan

    def _is_spike(self, value: float) -> bool:
        if self.finite_only and not math.isfinite(value):
            return True
        change = value - self.last_val
        if change <= 0 if self.mode == "min" else change >= 0:
            return False
        mean = self.running_mean
        distance = abs(value - mean)
        beyond_atol = self.atol is None or distance >= abs(self.atol)
        return beyond_atol and (self.rtol is None or distance >= abs(self.rtol * mean))

    def _write_bad_batches(self, batch_idx: int, write: bool) -> None:
        path = os.fspath(self.exclude_batches_path or os.getcwd())
        self.exclude_batches_path = path if path.endswith(".json") else os.path.join(path, "skip_batches.json")
        self.bad_batches.extend([batch_idx - 1, batch_idx])
        if write:
            os.makedirs(os.path.dirname(os.path.abspath(self.exclude_batches_path)), exist_ok=True)
            with open(self.exclude_batches_path, "w") as file:
                json.dump(self.bad_batches, file, indent=4)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's keys; "running" holds the losses in the mean, which Lightning leaves empty."""
        path = self.exclude_batches_path
        return {
            "last_val": self.last_val,
            "mode": self.mode,
            "warmup": self.warmup,
            "atol": self.atol,
            "rtol": self.rtol,
            "bad_batches": list(self.bad_batches),
            "bad_batches_path": None if path is None else os.fspath(path),
            "running": {"values": list(self.running)},
            "mean": {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, here or in Lightning."""
        self.last_val = float(state_dict["last_val"])
        self.mode = state_dict["mode"]
        self.warmup = state_dict["warmup"]
        self.atol = state_dict["atol"]
        self.rtol = state_dict["rtol"]
        self.bad_batches = list(state_dict["bad_batches"])
        self.exclude_batches_path = state_dict["bad_batches_path"]
        self.running = deque(state_dict["running"].get("values", ()), maxlen=self.running.maxlen)


class SpikeDetection(LossSpikes, Callback):
    """Ends the fit with TrainingSpikeException at a spike of the training loss; see `LossSpikes` for the arguments.

    The loss is what `training_step` returned, or its "loss". Without `exclude_batches_path` the file is
    `skip_batches.json` in the Trainer's `default_root_dir`.

    Raises:
        TypeError: `training_step` returned no loss.

    Example::

        Trainer(callbacks=[SpikeDetection(window=50, warmup=100, rtol=3.0)])
    """

    reads_gradients = False

    def on_train_batch_end(  # type: ignore[override]  # the two bases differ in what they are given
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"SpikeDetection watches the loss that training_step returns; in batch {batch_idx} it gave "
                f"{type(loss).__qualname__}. Return a tensor, or a dict with it under 'loss'."
            )
        if self.exclude_batches_path is None:
            self.exclude_batches_path = os.path.join(trainer.default_root_dir, "skip_batches.json")
        LossSpikes.on_train_batch_end(self, trainer, loss, batch, batch_idx)
