"""`Trainer`: the public face. What it decides before a run is in plan.py, what it repeats in loop.py and step.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import Tensor

from lit_fast.binding import clip_in_place
from lit_fast.callbacks.callback import Callback
from lit_fast.checkpoint import state as checkpoint_state
from lit_fast.config import refuse_unknown, resolve_config
from lit_fast.defaults import configure_callbacks, configure_loggers
from lit_fast.errors import MisconfigurationException
from lit_fast.evaluation import EvaluationLoop, can_validate
from lit_fast.hooks import is_overridden
from lit_fast.loop import FitLoop
from lit_fast.metrics import MetricLog
from lit_fast.module import LightningModule
from lit_fast.plan import Plans
from lit_fast.progress import NOW, Progress
from lit_fast.runtime import Runtime, attach_model, borrow_model
from lit_fast.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from lit_fast.strategies import SingleDeviceStrategy

if TYPE_CHECKING:
    from lit_fast.optim.configure import LRSchedulerConfig


class Trainer(Runtime):
    """Trains a `LightningModule`. Every argument of PyTorch Lightning's Trainer is accepted by name; the few that are
    not built yet are refused with an error that says so, unless left at their defaults.

    Args:
        accelerator: "auto" (a GPU where torch sees one), "cpu", "gpu" or "cuda".
        devices: "auto", 1, or [index].
        precision: "32-true", "bf16-mixed" or "bf16-true" (32 and "bf16" for short).
        logger: a logger, a list of them, True (TensorBoard where installed, else CSV), or False.
        callbacks: one callback or a list.
        max_epochs, max_steps: when to stop; 1,000 epochs when neither is given, -1 for no limit.
        min_epochs, min_steps: before these, `should_stop` waits.
        limit_train_batches, limit_val_batches: batches of an epoch (int), or a fraction of it (float).
        val_check_interval: validate every so many batches (int) or every fraction of an epoch (float).
        check_val_every_n_epoch: epochs between validations; None makes `val_check_interval` count across epochs.
        num_sanity_val_steps: validation batches run before training; -1 for all of them.
        log_every_n_steps: optimizer steps between two rows in the loggers; 50 by default.
        enable_checkpointing, enable_progress_bar, enable_model_summary: on by default.
        accumulate_grad_batches: micro-batches per optimizer step; the last window of an epoch may be shorter, and is
            then weighted by its real length.
        gradient_clip_val, gradient_clip_algorithm: clip by "norm" (default) or "value"; None or 0 switches it off.
        inference_mode: validate under `torch.inference_mode` (else `torch.no_grad`).
        profiler: "step" for a table of where the time of a step went.
        default_root_dir: where logs and checkpoints go; the working directory by default.
        keep_freed_memory: on the CPU, ask the allocator to keep freed memory between steps, since page faults cost
            more than every kernel here. It holds for the process and stays on after the fit.

    Raises:
        MisconfigurationException: an option is unknown, out of range, contradicts another, or is not built yet.

    Example::

        trainer = Trainer(max_epochs=3, gradient_clip_val=1.0)
        trainer.fit(model, train_dataloaders=loader)
        print(trainer.explain())
    """

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        precision: Any = None,
        logger: Any = None,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Any = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: Any = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: Any = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Any = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: Any = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        suggest_integrations: bool = True,
        keep_freed_memory: bool = True,
        **unknown: NoReturn,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "unknown")}
        if unknown:
            refuse_unknown(list(unknown), list(given))
        loggers, given_callbacks = given.pop("logger"), given.pop("callbacks")
        self.config = resolve_config(**given)
        self.strategy = SingleDeviceStrategy(self.config.device, precision_plugin=self.config.precision)
        self.state = TrainerState()
        self.loggers: list[Any] = configure_loggers(loggers, self.config.default_root_dir)
        self.callbacks = configure_callbacks(given_callbacks, self.config)
        self.datamodule = None
        # Callbacks may change these; the loop asks before each epoch (`Plans.refresh`).
        self.accumulate_grad_batches = self.config.accumulate_grad_batches
        self.gradient_clip_val = self.config.gradient_clip_val
        self.gradient_clip_algorithm = self.config.gradient_clip_algorithm
        self._module: LightningModule | None = None
        self._metric_log = MetricLog()
        self._progress = Progress()
        self._profiler = self._make_profiler()
        self.fit_loop = FitLoop(self)
        self._evaluation = EvaluationLoop(self)
        self._should_stop = False
        self._interrupt = None  # a signal that waits for the end of the running step
        self._pending_rng = None  # of a checkpoint, until the first step is near
        self._pending_metrics = None  # the same, until the sanity check is over
        self._sources: dict[str, Any] = {}
        self.ckpt_path: str | None = None

    # -- running

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train `model` until a limit, a stop, or an interrupt.

        Args:
            model: a LightningModule, or `torch.compile` of one.
            train_dataloaders, val_dataloaders: any iterable of batches; or a datamodule, or the module's own methods.
            ckpt_path: resume from this checkpoint; "last" finds the newest one, and starts anew where there is none.
            weights_only: load the checkpoint without executing pickled code (the default); False only for a file you
                trust.

        Raises:
            MisconfigurationException: no training_step, no data, contradictory options.
            CheckpointError: the checkpoint is missing, damaged, of another model, or holds code.
        """
        if hasattr(train_dataloaders, "prepare_data"):
            train_dataloaders, datamodule = None, train_dataloaders
        with attach_model(self, model, TrainerFn.FITTING) as module:
            self._check_can_fit(module)
            self._use_data(module, datamodule, train_dataloader=train_dataloaders, val_dataloader=val_dataloaders)
            checkpoint = self._prepare(module, "fit", ckpt_path, weights_only)
            self._begin_fit(module, checkpoint)
            self.fit_loop.run()
            self._end_fit(module)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run the validation loop once; returns the logged values, one dict per loader.

        Raises:
            MisconfigurationException: no model so far, no validation_step, no data.
        """
        if hasattr(dataloaders, "prepare_data"):
            dataloaders, datamodule = None, dataloaders
        model = self._module if model is None else model
        if model is None:
            raise MisconfigurationException("trainer.validate() needs a model: none was passed, now or before.")
        with attach_model(self, model, TrainerFn.VALIDATING) as module:
            if not can_validate(module):
                raise MisconfigurationException(
                    f"{type(module).__name__} defines no validation_step(batch, batch_idx); validate() needs it."
                )
            self._use_data(module, datamodule, val_dataloader=dataloaders)
            self._prepare(module, "validate", ckpt_path, weights_only)
            module.to(self.config.device)
            self.config.precision.convert_module(module)
            self._log_hyperparameters(module)
            results = self._evaluation.run()
            self._tear_down(module, "validate")
            if verbose:
                self._print_results(results)
        return results

    def test(self, *args: Any, **kwargs: Any) -> Any:
        raise MisconfigurationException("trainer.test() is not built yet; trainer.validate() runs validation_step.")

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise MisconfigurationException("trainer.predict() is not built yet; call the module itself on your batches.")

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint in Lightning's format; the file appears whole or not at all.

        Args:
            weights_only: leave out optimizers, schedulers, callbacks and loops.

        Raises:
            MisconfigurationException: no model is attached, or `storage_options` is given.
            CheckpointError: it could not be written; a file of that name is as it was.
        """
        if self._module is None:
            raise MisconfigurationException("save_checkpoint needs a model: call it during or after fit or validate.")
        if storage_options is not None:
            raise MisconfigurationException(
                "save_checkpoint(storage_options=...) is not built yet; checkpoints are local files so far."
            )
        with self._profiler.phase("checkpoint") if self._profiler is not None else nullcontext():
            checkpoint_state.save(self, Path(filepath), bool(weights_only))

    def explain(self, model: LightningModule | None = None) -> str:
        """Everything that a training step does, in order: what is bound, who asked for it, how it is done.

        After or during a fit it describes that run; before one, pass the model.
        """
        if model is not None and (self.fit_loop.plans is None or self._module is not model):
            with borrow_model(self, model) as module:
                self._check_can_fit(module)
                self._configure_optimizers(module)
                plans = Plans(self, module)
                return "\n".join([plans.explain(), *self._explain_run()])
        if self.fit_loop.plans is None:
            raise MisconfigurationException("Nothing has run yet: pass the model, trainer.explain(model).")
        return "\n".join([self.fit_loop.plans.explain(), *self._explain_run()])

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, above the progress bar where there is one."""
        bar = self.progress_bar_callback
        if bar is not None and hasattr(bar, "print"):
            bar.print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    def _clip_in_place(self, optimizer: Any, value: float | None, algorithm: str | None) -> None:
        value = self.gradient_clip_val if value is None else value
        if value:
            clip_in_place(optimizer, value, algorithm or self.gradient_clip_algorithm)

    def _manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        module = self.lightning_module
        if module.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward was called under automatic optimization; set self.automatic_optimization = False in "
                "the module's __init__, or return the loss from training_step."
            )
        self._run_step_hooks("on_before_backward", loss)
        module.backward(loss, *args, **kwargs)
        self._run_step_hooks("on_after_backward")

    # -- what callbacks and users read

    @property
    def lightning_module(self) -> LightningModule:
        """The module that runs, or ran last."""
        assert self._module is not None, "no model is attached yet"
        return self._module

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
    def accelerator(self) -> Any:
        return self.strategy.accelerator

    @property
    def precision_plugin(self) -> Any:
        return self.strategy.precision_plugin

    @property
    def scaler(self) -> Any:
        """The gradient scaler of "16-mixed", else None."""
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def should_stop(self) -> bool:
        """Set to True to stop after the running step (minimum epochs and steps permitting)."""
        return self._should_stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self._should_stop = stop
        self._progress.boundary = NOW

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, over all optimizers."""
        return self._progress.global_step

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
        return (
            self._sources.get("val_dataloader") is not None
            or is_overridden("val_dataloader", module, LightningModule)
            or self._datamodule_overrides("val_dataloader")
        )

    @property
    def num_training_batches(self) -> int | float:
        """Batches of a training epoch (inf where unknown)."""
        return float("inf") if self._progress.total is None else self._progress.total

    @property
    def num_val_batches(self) -> list[int | float]:
        return self._evaluation.num_batches

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        return [min(self.config.num_sanity_val_steps, limit) for limit in self._evaluation.num_batches]

    @property
    def num_sanity_val_steps(self) -> int | float:
        steps = self.config.num_sanity_val_steps
        return float("inf") if steps == -1 else steps

    @property
    def val_check_batch(self) -> int | float:
        return self.fit_loop.val_check_batch

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that the whole fit will take (inf where unknown); loads the training data if need be."""
        if self.fit_loop.loader is None:
            self.fit_loop.load_data()
        total, config = self._progress.total, self.config
        if total is None or self.fit_loop.max_epochs == -1:
            return config.max_steps if config.max_steps != -1 else float("inf")
        steps = -(-total // self.accumulate_grad_batches) * max(self.fit_loop.max_epochs, 1)
        return steps if config.max_steps == -1 else min(steps, config.max_steps)

    @property
    def train_dataloader(self) -> Any:
        return self.fit_loop.loader

    @property
    def val_dataloaders(self) -> Any:
        loaders = self._evaluation.loaders
        return loaders[0] if loaders is not None and len(loaders) == 1 else loaders

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Any) -> None:
        self.loggers = [logger] if logger else []

    @property
    def log_dir(self) -> str | None:
        """Where the first logger writes, or `default_root_dir`."""
        if self.loggers:
            return cast("str | None", getattr(self.loggers[0], "log_dir", None) or self.loggers[0].save_dir)
        return str(self.default_root_dir)

    @property
    def default_root_dir(self) -> str:
        return str(self.config.default_root_dir)

    @property
    def profiler(self) -> Any:
        return self._profiler

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
        if not any("progress" in type(callback).__module__ for callback in self.callbacks):
            return None
        from lit_fast.callbacks.progress import ProgressBar

        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    @property
    def training(self) -> bool:
        return self.state.stage == RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        return self.state.stage == RunningStage.VALIDATING

    @property
    def sanity_checking(self) -> bool:
        return self.state.stage == RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        return self.state.stage is not None and self.state.stage.evaluating

    testing = predicting = False

    @property
    def interrupted(self) -> bool:
        return self.state.status == TrainerStatus.INTERRUPTED

    global_rank = local_rank = node_rank = 0
    world_size = num_nodes = num_devices = 1
    is_global_zero = True
    fast_dev_run = False
    barebones = False

    @property
    def precision(self) -> str:
        return self.config.precision.precision

    @property
    def max_epochs(self) -> int:
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

    def __getattr__(self, name: str) -> Any:
        """Options that only configuration holds (`log_every_n_steps`, `limit_val_batches`, ...) read as attributes."""
        config = self.__dict__.get("config")
        if config is not None and name in type(config).__dataclass_fields__:
            return getattr(config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
