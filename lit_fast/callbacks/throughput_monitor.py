"""Log how many batches, samples, items and FLOPs a second a run gets through."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lit_fast.callbacks._logging_steps import evaluation_logs, training_logs
from lit_fast.callbacks.callback import Callback
from lit_fast.profiler.throughput import Throughput, compute_dtype, get_available_flops
from lit_fast.states import RunningStage, TrainerFn


class _Stage:
    """What was counted in one stage of a run."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.start = 0.0  # time.perf_counter() seconds
        self.elapsed = 0.0  # seconds from `start` to the newest update
        self.batches = self.samples = self.lengths = 0
        self.batches_in_run = 0  # of the validation, test or prediction that runs
        self.rows = 0  # batches under which the loggers get a row: over all validations of a training epoch

    def reset(self) -> None:
        self.throughput.reset()
        self.elapsed = 0.0
        self.batches = self.samples = self.lengths = 0


class ThroughputMonitor(Callback):
    """Sends `<stage>/batches_per_sec` and its kin to the loggers; the names are those of `Throughput.compute`.

    A module with an attribute or property `flops_per_batch` (FLOPs of one batch, see `measure_flops`) gets its FLOP/s
    logged too, and where the device's peak is known, its utilization `<stage>/device/mfu`. Time spent in validation
    does not count as training.

    Args:
        batch_size_fn: number of samples in a batch.
        length_fn: number of items, such as tokens, in a batch.
        **kwargs: arguments of `Throughput`: `window_size`, `separator`.

    Example::

        Trainer(callbacks=[ThroughputMonitor(batch_size_fn=len, window_size=20)])
    """

    reads_gradients = False

    def __init__(
        self, batch_size_fn: Callable[[Any], int], length_fn: Callable[[Any], int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        Throughput(**kwargs)  # wrong arguments are refused now, not at the first fit
        self.kwargs = kwargs
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.available_flops: int | None = None
        self._stages: dict[str, _Stage] = {}
        self._module_has_flops: bool | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.available_flops = get_available_flops(trainer.strategy.root_device, compute_dtype(trainer.precision))
        stages = [trainer.state.stage]
        if stage == TrainerFn.FITTING and trainer.enable_validation:
            stages.append(RunningStage.VALIDATING)
        for name in stages:
            throughput = Throughput(available_flops=self.available_flops, world_size=trainer.world_size, **self.kwargs)
            if name in self._stages:  # counts go on from run to run, the window does not
                self._stages[name].throughput = throughput
            else:
                self._stages[name] = _Stage(throughput)

    # -- training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if RunningStage.VALIDATING in self._stages:
            self._stages[RunningStage.VALIDATING].rows = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._update(trainer, pl_module, batch)
        if training_logs(trainer, batch_idx) and not trainer.fit_loop._should_accumulate():
            self._log(trainer)

    # -- validation, test, prediction

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._start(trainer)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._evaluated(trainer, pl_module, batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training's clock goes on from where it stood when validation began."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        training, validation = self._stages[RunningStage.TRAINING], self._stages[RunningStage.VALIDATING]
        training.start = validation.start + validation.elapsed - training.elapsed

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated(trainer, pl_module, batch)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated(trainer, pl_module, batch)

    # -- counting

    def _start(self, trainer: Any) -> None:
        stage = self._stages[trainer.state.stage]
        if trainer.state.fn == TrainerFn.FITTING:
            stage.reset()
        stage.batches_in_run = 0
        stage.start = time.perf_counter()

    def _evaluated(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        stage = self._update(trainer, pl_module, batch)
        stage.rows += 1
        stage.batches_in_run += 1
        if evaluation_logs(trainer, stage.batches_in_run):
            self._log(trainer, stage.rows)

    @torch.inference_mode()
    def _update(self, trainer: Any, pl_module: Any, batch: Any) -> _Stage:
        stage = self._stages[trainer.state.stage]
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()  # a batch's time is known when the device is through with it
        stage.elapsed = time.perf_counter() - stage.start
        if self._module_has_flops is None:
            self._module_has_flops = hasattr(pl_module, "flops_per_batch")
            if not self._module_has_flops:
                warnings.warn(
                    f"ThroughputMonitor: {type(pl_module).__name__} has no `flops_per_batch` (FLOPs of one batch, see "
                    f"measure_flops), so no FLOP/s are logged.",
                    stacklevel=2,
                )
        stage.batches += 1
        stage.samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            stage.lengths += self.length_fn(batch)
        stage.throughput.update(
            time=stage.elapsed,
            batches=stage.batches,
            samples=stage.samples,
            lengths=None if self.length_fn is None else stage.lengths,
            flops=pl_module.flops_per_batch if self._module_has_flops else None,
        )
        return stage

    def _log(self, trainer: Any, step: int | None = None) -> None:
        throughput = self._stages[trainer.state.stage].throughput
        prefix = f"{trainer.state.stage.value}{throughput.separator}"
        trainer._log_metrics({prefix + name: value for name, value in throughput.compute().items()}, step=step)
