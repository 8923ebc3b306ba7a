"""What callbacks and users read of a Trainer, and what they may write: options, states, counters, loaders, metrics.

Nothing here has state of its own: each name reads the room that keeps it.
"""

from __future__ import annotations

import math
import signal
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lit_fast.config import Option
from lit_fast.connectors import AcceleratorConnector, CheckpointConnector, LoggerConnector
from lit_fast.data.combined import CombinedLoader
from lit_fast.defaults import is_kind
from lit_fast.evaluation import can_validate
from lit_fast.module import LightningModule
from lit_fast.progress import NOW
from lit_fast.runtime import Runtime
from lit_fast.states import RunningStage, TrainerFn, TrainerStatus
from lit_fast.strategies.control import Wish

if TYPE_CHECKING:
    from lit_fast.accelerators import Accelerator
    from lit_fast.config import TrainerConfig
    from lit_fast.evaluation import EvaluationLoop
    from lit_fast.loop import FitLoop
    from lit_fast.metrics import MetricLog
    from lit_fast.optim.configure import LRSchedulerConfig
    from lit_fast.prediction import PredictionLoop
    from lit_fast.progress import Progress
    from lit_fast.states import TrainerState
    from lit_fast.strategies.strategy import Strategy


class Stage:
    """Whether one stage runs. Writing True makes it the running one, as code that drives the loops itself does."""

    def __init__(self, stage: RunningStage) -> None:
        self.stage = stage

    def __get__(self, trainer: Any, owner: type | None = None) -> bool:
        running = None if trainer is None else trainer.state.stage
        return running is self.stage or (type(running) is str and running == self.stage)

    def __set__(self, trainer: Any, runs: bool) -> None:
        if runs:
            trainer.state.stage = self.stage
        elif trainer.state.stage == self.stage:
            trainer.state.stage = None


class Attributes(Runtime):
    """The readable and writable face of a Trainer."""

    if TYPE_CHECKING:
        config: TrainerConfig
        fit_loop: FitLoop
        state: TrainerState
        strategy: Strategy
        validate_loop: EvaluationLoop
        test_loop: EvaluationLoop
        predict_loop: PredictionLoop
        _metric_log: MetricLog
        _module: LightningModule | None
        _progress: Progress

    # -- options: what is written holds from the next run (accumulation and clipping: from the next epoch) on

    accumulate_grad_batches = Option()
    barebones = Option()
    check_val_every_n_epoch = Option()
    enable_autolog_hparams = Option()
    fast_dev_run = Option()
    gradient_clip_algorithm = Option()
    gradient_clip_val = Option()
    limit_predict_batches = Option()
    limit_test_batches = Option()
    limit_train_batches = Option()
    limit_val_batches = Option()
    log_every_n_steps = Option()
    num_sanity_val_steps = Option()
    overfit_batches = Option()
    reload_dataloaders_every_n_epochs = Option()
    suggest_integrations = Option()
    val_check_interval = Option()

    # -- the module and its progress

    @property
    def lightning_module(self) -> LightningModule:
        """The module that runs, or ran last; None before the first run."""
        return cast(LightningModule, self._module)

    @property
    def model(self) -> LightningModule | None:
        return self._module

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers from `configure_optimizers`. May be set: other ones are stepped from the next epoch on."""
        return self.strategy.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Any]) -> None:
        self.strategy.optimizers = optimizers

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The learning rate schedulers and when each of them steps. The list may be changed, as `optimizers`."""
        return self.strategy.lr_scheduler_configs

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self.config.accelerator

    @property
    def precision_plugin(self) -> Any:
        return self.strategy.precision_plugin

    @property
    def scaler(self) -> Any:
        """The gradient scaler of "16-mixed", else None."""
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def should_stop(self) -> bool:
        """Set to True to stop after the running step (minimum epochs and steps permitting).

        With several processes all of them stop, after the next step that they take together.
        """
        return self._should_stop or self._asks_for(Wish.STOP)

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        if stop and self._shared is not None:
            self._shared.wish(Wish.STOP)
            return
        if self._shared is not None:
            self._shared.fulfilled(Wish.STOP)
        self._should_stop = stop
        self._progress.boundary = NOW

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, over all optimizers."""
        return self._progress.global_step

    @property
    def skipped_steps(self) -> int:
        """Steps that `nonfinite="skip"` has left out in the last fit. `global_step` counts them too."""
        guard = self.fit_loop.plans.binding.stepping.guard if self.fit_loop.plans is not None else None
        return 0 if guard is None else guard.skipped_steps

    @property
    def current_epoch(self) -> int:
        """Epochs finished."""
        return self._progress.epoch

    @property
    def is_last_batch(self) -> bool:
        """Whether the running batch is the last one of its epoch."""
        progress = self._progress
        return progress.is_last_batch or progress.batch_idx + 1 == progress.total

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of everything logged, as 0-dim tensors, for callbacks."""
        return self._metric_log.callback_metrics()

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return self._metric_log.logged_metrics()

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return self._metric_log.progress_bar_metrics()

    @property
    def enable_validation(self) -> bool:
        """Whether this fit validates: there is a validation_step, data for it, and a limit above 0."""
        module = self._module
        if module is None or not can_validate(module) or self.config.limit_val_batches == 0:
            return False
        return self._defines_loader("val_dataloader")

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the run began with. Set before a run, it is where runs without a `ckpt_path` begin."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: Any) -> None:
        self._ckpt_path, self._ckpt_path_was_set = path, bool(path)

    @property
    def num_training_batches(self) -> int | float:
        """Batches of a training epoch (inf where unknown)."""
        return float("inf") if self._progress.total is None else self._progress.total

    @property
    def num_val_batches(self) -> list[int | float]:
        """Validation batches of each loader (inf where unknown), also while the sanity check takes fewer."""
        validating = self.state.fn == TrainerFn.VALIDATING
        return (self.validate_loop if validating else self.fit_loop.epoch_loop.val_loop).limits

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        return [min(self.num_sanity_val_steps, limit) for limit in self.fit_loop.epoch_loop.val_loop.limits]

    @property
    def num_test_batches(self) -> list[int | float]:
        return self.test_loop.max_batches

    @property
    def num_predict_batches(self) -> list[int | float]:
        return self.predict_loop.max_batches

    @property
    def val_check_batch(self) -> int | float | None:
        return self.fit_loop.val_check_batch

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that the whole fit will take (inf where unknown); loads the training data if need be."""
        max_epochs = self.max_epochs
        unlimited = self.max_steps if self.max_steps != -1 else math.inf
        if max_epochs is None or max_epochs == -1:
            return unlimited
        if self.fit_loop.loader is None:
            self.fit_loop.setup_data()
        total = self.num_training_batches
        if total == math.inf:
            return unlimited
        return min(math.ceil(total / self.config.accumulate_grad_batches) * max(max_epochs, 1), unlimited)

    @property
    def train_dataloader(self) -> Any:
        """The training data of the fit, as it was given."""
        loader = self.fit_loop.loader
        return loader.iterables if isinstance(loader, CombinedLoader) else loader

    @property
    def val_dataloaders(self) -> Any:
        """The validation data of the fit, or of `validate`, as it was given."""
        fitting = self.fit_loop.epoch_loop.val_loop.loaders
        return self.validate_loop.loaders if fitting is None else fitting

    @property
    def test_dataloaders(self) -> Any:
        return self.test_loop.loaders

    @property
    def predict_dataloaders(self) -> Any:
        return self.predict_loop.loaders

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Any) -> None:
        self.loggers = [logger] if logger else []

    @property
    def loggers(self) -> list[Any]:
        """Every logger."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: list[Any] | None) -> None:
        self._loggers = loggers or []

    @property
    def log_dir(self) -> str | None:
        """Where the first logger writes, or `default_root_dir`."""
        if not self.loggers:
            return self.default_root_dir
        files = is_kind(self.loggers[0], "TensorBoardLogger", "CSVLogger")
        return cast("str | None", self.loggers[0].log_dir if files else self.loggers[0].save_dir)

    @property
    def default_root_dir(self) -> str:
        return str(self.config.default_root_dir)

    @property
    def profiler(self) -> Any:
        """The profiler that was asked for, or one that records nothing, so that user code can always call it."""
        if self._shown_profiler is None:
            from lit_fast.profiler.profiler import PassThroughProfiler

            self._shown_profiler = PassThroughProfiler()
        return self._shown_profiler

    @profiler.setter
    def profiler(self, profiler: Any) -> None:
        self._use_profiler(profiler)

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        from lit_fast.callbacks.checkpoint import Checkpoint

        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first checkpoint callback, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        from lit_fast.callbacks.early_stopping import EarlyStopping

        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> Any:
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar, or None."""
        return next((callback for callback in self.callbacks if is_kind(callback, "ProgressBar")), None)

    @property
    def evaluating(self) -> bool:
        return self.state.stage is not None and self.state.stage.evaluating

    training = Stage(RunningStage.TRAINING)
    validating = Stage(RunningStage.VALIDATING)
    testing = Stage(RunningStage.TESTING)
    predicting = Stage(RunningStage.PREDICTING)
    sanity_checking = Stage(RunningStage.SANITY_CHECKING)

    @property
    def received_sigterm(self) -> bool:
        """Whether SIGTERM came: the run is about to end, or has."""
        return self._interrupt == signal.SIGTERM or self._terminated

    @property
    def interrupted(self) -> bool:
        return self.state.status == TrainerStatus.INTERRUPTED

    @property
    def device_ids(self) -> list[int]:
        """The indices of this machine's devices, one a process."""
        devices = self.config.devices
        return [index if device.index is None else device.index for index, device in enumerate(devices)]

    @property
    def num_devices(self) -> int:
        return len(self.device_ids)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """How a DistributedSampler shares the data out; None in one process."""
        return self.strategy.distributed_sampler_kwargs

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this machine."""
        return self.strategy.node_rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.strategy.world_size

    @property
    def num_nodes(self) -> int:
        """How many machines there are."""
        return self.config.num_nodes

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first of all processes, the one that writes files."""
        return self.strategy.is_global_zero

    @property
    def precision(self) -> str:
        return self.config.precision.precision

    @property
    def max_epochs(self) -> int | None:
        return self.fit_loop.max_epochs

    @property
    def min_epochs(self) -> int | None:
        return self.fit_loop.min_epochs

    @property
    def max_steps(self) -> int:
        return self.fit_loop.max_steps

    @property
    def min_steps(self) -> int | None:
        return self.fit_loop.min_steps

    # -- private in Lightning, and used all the same

    @property
    def _checkpoint_connector(self) -> CheckpointConnector:
        return CheckpointConnector(self._trainer)

    @property
    def _logger_connector(self) -> LoggerConnector:
        return LoggerConnector(self._trainer)

    @property
    def _accelerator_connector(self) -> AcceleratorConnector:
        return AcceleratorConnector(self._trainer)
