"""`Trainer`: the public face. What it decides before a run is in plan.py, what it repeats in loop.py and step.py."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from lit_fast.attach import attach_model, borrow_model, unwrapped
from lit_fast.attributes import Attributes
from lit_fast.callbacks.callback import Callback
from lit_fast.checkpoint import state as checkpoint_state
from lit_fast.checkpoint.plugins import split_plugins
from lit_fast.config import apply_barebones, defaults_from_environment, refuse_unknown, resolve_config
from lit_fast.defaults import configure_callbacks, configure_loggers
from lit_fast.errors import MisconfigurationException, MisconfigurationTypeError
from lit_fast.evaluation import TEST, VALIDATION, EvaluationLoop, print_results
from lit_fast.flags import announce, set_torch_flags
from lit_fast.hooks import is_overridden
from lit_fast.loop import FitLoop
from lit_fast.metrics import MetricLog, MutedLog
from lit_fast.model_checks import check_fit, warn_of_half_a_validation
from lit_fast.module import LightningModule
from lit_fast.plan import Plans
from lit_fast.prediction import PredictionLoop
from lit_fast.profiler.actions import recorded
from lit_fast.progress import Progress
from lit_fast.states import TrainerFn, TrainerState
from lit_fast.strategies.choosing import choose_strategy
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.layer_sync import LayerSync, TorchSyncBatchNorm
from lit_fast.trial import Trial, trying


class Trainer(Attributes):
    """Trains a `LightningModule`. Every argument of PyTorch Lightning's Trainer is accepted by name; the few that are
    not built yet are refused with an error that says so, unless left at their defaults.

    Args:
        accelerator: "auto" (a GPU where torch sees one), "cpu", "gpu" or "cuda".
        devices: how many, a list of indices, -1 or "auto" for all; one process each (on a CPU: processes).
        num_nodes: machines, each with as many devices.
        strategy: "auto" (one device, or "ddp"), "ddp", "zero1", "fsdp2" and others (docs/distributed.md), or an object.
        precision: "64-true", "32-true", "16-true", "bf16-true", "16-mixed" or "bf16-mixed" (64, 32, 16 and "bf16" for
            short, the last two mixed).
        plugins: objects of yours that derive from `Precision`, `CheckpointIO`, `ClusterEnvironment` or `LayerSync`.
        sync_batchnorm: batch norms take the statistics of all processes.
        use_distributed_sampler: share the data of each DataLoader out over the processes.
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
            then weighted by its real length. `training_step` may return how much each one weighs, beside its loss.
        gradient_clip_val, gradient_clip_algorithm: clip by "norm" (default) or "value"; None or 0 switches it off.
        inference_mode: validate under `torch.inference_mode` (else `torch.no_grad`).
        profiler: "step" for where the time of a step goes, "deep" for a closer look at some steps; "simple",
            "advanced", "pytorch" or a `Profiler` for named actions, as in Lightning.
        default_root_dir: where logs and checkpoints go; the working directory by default.
        keep_freed_memory: on the CPU, ask the allocator to keep freed memory between steps, since page faults cost
            more than every kernel here. It holds for the process and stays on after the fit.
        grad_dtype: "float32" keeps and accumulates the gradients of bfloat16 and float16 parameters in float32, for the
            length of a fit (torch's `Tensor.grad_dtype`); None keeps them in the parameters' dtype.
        nonfinite: a step with a gradient that is NaN or infinite is taken ("propagate", as torch does), left out and
            counted in `trainer.skipped_steps` ("skip"), or an error that names the parameter ("raise").

    Raises:
        MisconfigurationException: an option is unknown, out of range, contradicts another, or is not built yet.

    Example::

        trainer = Trainer(max_epochs=3, gradient_clip_val=1.0)
        trainer.fit(model, train_dataloaders=loader)
        print(trainer.explain())
    """

    @defaults_from_environment
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
        grad_dtype: Any = None,
        nonfinite: str = "propagate",
        **unknown: NoReturn,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "unknown")}
        if unknown:
            refuse_unknown(list(unknown), list(given))
        if barebones:
            apply_barebones(given)
        loggers, given_callbacks = given.pop("logger"), given.pop("callbacks")
        checkpoint_io, given["plugins"] = split_plugins(given["plugins"])
        environment, self._layer_sync = (
            _of_kind(given["plugins"], ClusterEnvironment),
            _of_kind(given["plugins"], LayerSync),
        )
        if sync_batchnorm and self._layer_sync is None:
            self._layer_sync = TorchSyncBatchNorm()
        config = resolve_config(**given)
        self.strategy = choose_strategy(strategy, config.devices, config.num_nodes, environment)
        precision = self.strategy.precision_for(config.precision)
        self.config = replace(config, device=self.strategy.root_device, precision=precision)
        self.strategy.accelerator, self.strategy.precision_plugin = self.config.accelerator, self.config.precision
        if checkpoint_io is not None:
            self.strategy.checkpoint_io = checkpoint_io
        self.state = TrainerState()
        self.loggers = configure_loggers(loggers, self.config.default_root_dir, self.config.fast_dev_run)
        self.callbacks = configure_callbacks(given_callbacks, self.config)
        self.datamodule = self._data_owner = None
        self._module: LightningModule | None = None
        self._use_profiler(self.config.profiler)
        self._make_loops()
        self._should_stop = False
        self._interrupt = None  # a signal that waits for the end of the running step
        self._pending_rng = None  # of a checkpoint, until the first step is near
        self._pending_metrics = None  # the same, until the sanity check is over
        self._sources: dict[str, Any] = {}
        self.ckpt_path = None
        set_torch_flags(self.config)
        announce(self.config)

    def _make_loops(self) -> None:
        """Counters, logged values and loops, as they are before anything has run."""
        self._metric_log = MutedLog() if self.config.barebones else MetricLog()
        self._progress = Progress()
        self.fit_loop = FitLoop(self)
        val_loop = self.fit_loop.epoch_loop.val_loop = EvaluationLoop(self, VALIDATION, verbose=False)
        # Inside a fit what a hook makes (a mask, a mean) may be trained with: not in inference mode, as in Lightning.
        val_loop.inference_mode = False
        self.validate_loop = EvaluationLoop(self, VALIDATION)
        self.test_loop = EvaluationLoop(self, TEST)
        self.predict_loop = PredictionLoop(self)
        self._evaluation: EvaluationLoop | PredictionLoop = val_loop  # of the running method

    def _loop_of(self, fn: TrainerFn) -> EvaluationLoop | PredictionLoop:
        """The loop that evaluates in the method `fn`."""
        loops: dict[TrainerFn, EvaluationLoop | PredictionLoop] = {
            TrainerFn.FITTING: self.fit_loop.epoch_loop.val_loop,
            TrainerFn.VALIDATING: self.validate_loop,
            TrainerFn.TESTING: self.test_loop,
            TrainerFn.PREDICTING: self.predict_loop,
        }
        return loops[fn]

    def _trying(self) -> AbstractContextManager[Trial]:
        """A block of runs inside this one that leave no trace, for callbacks that search."""
        return trying(self)

    # -- running

    def _launch(self, method: str, *given: Any) -> Any:
        """That method of this Trainer in as many processes as the strategy wants on this machine."""
        self.state.fn = TrainerFn(method)
        if given[0] is not None:
            self._module = unwrapped(given[0], method)  # gets the weights that the other processes come to
        return self.strategy.launcher.launch(_run_launched, self, method, given, trainer=self)

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
        if self.strategy.launcher is not None:
            given = (model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
            self._launch("fit", *given)
            return
        if hasattr(train_dataloaders, "prepare_data"):
            train_dataloaders, datamodule = None, train_dataloaders
        with attach_model(self, model, TrainerFn.FITTING) as module:
            self._use_data(datamodule, train_dataloader=train_dataloaders, val_dataloader=val_dataloaders)
            check_fit(self, module)
            warn_of_half_a_validation(self, module)
            checkpoint = self._prepare(module, "fit", ckpt_path, weights_only)
            self._begin_fit(module, checkpoint)
            with torch.autograd.set_detect_anomaly(self.config.detect_anomaly), self._in_phase("unexplained"):
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
        """Run `validation_step` over the validation data once.

        Args:
            model: a LightningModule; where it is left out, the one that ran last, with the weights of its best
                checkpoint unless `ckpt_path` says otherwise.
            dataloaders: a loader, or a list, dict or `CombinedLoader` of them; or a datamodule, or the module's own
                `val_dataloader`.
            ckpt_path: a checkpoint whose weights are loaded first: a path, "best" or "last".
            verbose: print the results.
            weights_only: load the checkpoint without executing pickled code (the default).

        Returns:
            The values that were logged for the epoch, one dict per loader.

        Raises:
            MisconfigurationException: no model so far, no validation_step, no data, or no best checkpoint.
        """
        if self.strategy.launcher is not None:
            return self._launch("validate", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)  # type: ignore[no-any-return]
        self.validate_loop.verbose = verbose
        return self._evaluate(self.validate_loop, model, dataloaders, datamodule, ckpt_path, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run `test_step` over the test data once; arguments, results and errors are those of `validate`."""
        if self.strategy.launcher is not None:
            return self._launch("test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)  # type: ignore[no-any-return]
        self.test_loop.verbose = verbose
        return self._evaluate(self.test_loop, model, dataloaders, datamodule, ckpt_path, weights_only)

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Run `predict_step` over the data once; it calls the module itself unless it is overridden.

        Args:
            model, dataloaders, datamodule, ckpt_path, weights_only: as for `validate`.
            return_predictions: False keeps nothing, for callbacks that write the predictions themselves.

        Returns:
            What the steps returned, moved to the CPU: a list, with several loaders a list of lists; None where
            `return_predictions=False`.

        Raises:
            MisconfigurationException: no model so far, neither predict_step nor forward, no data.
        """
        if self.strategy.launcher is not None:
            given = (model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)
            return self._launch("predict", *given)  # type: ignore[no-any-return]
        self.predict_loop.return_predictions = return_predictions is None or bool(return_predictions)
        passed = model
        model, dataloaders, datamodule = self._arguments("predict", model, dataloaders, datamodule)
        predictions: list[Any] | None = None  # what a run returns that a search ends
        with attach_model(self, model, TrainerFn.PREDICTING) as module:
            if not any(is_overridden(name, module, LightningModule) for name in ("predict_step", "forward")):
                raise MisconfigurationException(
                    f"{type(module).__name__} defines neither predict_step(batch, batch_idx) nor forward(batch); "
                    f"predict() needs one of them."
                )
            self._use_data(datamodule, predict_dataloader=dataloaders)
            self._prepare_evaluation(module, "predict", self._best_if_no_model(passed, ckpt_path), weights_only)
            predictions = self.predict_loop.run()
            self._tear_down(module)
        return predictions

    def _evaluate(
        self,
        loop: EvaluationLoop,
        given: LightningModule | None,
        dataloaders: Any,
        datamodule: Any,
        ckpt_path: str | Path | None,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:
        names, fn = loop.names, TrainerFn(loop.names.stage)
        model, dataloaders, datamodule = self._arguments(names.stage, given, dataloaders, datamodule)
        results: list[dict[str, float]] = []  # what a run returns that a search ends
        with attach_model(self, model, fn) as module:
            if not is_overridden(names.step, module, LightningModule):
                raise MisconfigurationException(
                    f"{type(module).__name__} defines no {names.step}(batch, batch_idx); {fn.value}() needs it."
                )
            self._use_data(datamodule, **{f"{names.data}_dataloader": dataloaders})
            self._prepare_evaluation(module, names.stage, self._best_if_no_model(given, ckpt_path), weights_only)
            results = loop.run()
            if loop.verbose and self.is_global_zero:
                print_results(results, names.stage)
            self._tear_down(module)
        return results

    def _arguments(
        self, method: str, model: LightningModule | None, dataloaders: Any, datamodule: Any
    ) -> tuple[LightningModule, Any, Any]:
        """Model, loaders and datamodule as validate, test and predict were given them, in whichever place."""
        if hasattr(dataloaders, "prepare_data"):
            dataloaders, datamodule = None, dataloaders
        model = self._module if model is None else model
        if model is None:
            raise MisconfigurationTypeError(
                f"trainer.{method}() needs a model: none was passed, now or before. Pass one: trainer.{method}(model)."
            )
        return model, dataloaders, datamodule

    def _best_if_no_model(self, model: LightningModule | None, ckpt_path: Any) -> Any:
        """`ckpt_path`, or "best" where neither it nor a model was passed, as in Lightning."""
        if model is not None or ckpt_path is not None or self._ckpt_path_was_set:
            return ckpt_path
        method = "" if self.state.fn is None else self.state.fn.value
        warnings.warn(
            f"trainer.{method}() without a model loads the best checkpoint of the last fit. Say so with "
            f"ckpt_path='best' (or 'last'), or pass the model to use its weights as they are.",
            stacklevel=4,
        )
        return "best"

    def _prepare_evaluation(
        self, module: LightningModule, stage: str, ckpt_path: Any, weights_only: bool | None
    ) -> None:
        """From `configure_callbacks` to a module on its device."""
        self._set_up_strategy(module, self._prepare(module, stage, ckpt_path, weights_only))
        self._log_hyperparameters(module)

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """A context that builds a module right where, and in the dtype in which, it will run.

        Args:
            empty_init: leave the memory of new weights as it is, for a module whose weights are loaded next.

        Example::

            trainer = Trainer(precision="bf16-true")
            with trainer.init_module(empty_init=True):
                model = Model()  # bfloat16, on the trainer's device
            trainer.fit(model, ckpt_path="model.ckpt")
        """
        return self.strategy.tensor_init_context(empty_init=empty_init)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint in Lightning's format; the file appears whole or not at all.

        Args:
            weights_only: leave out optimizers, schedulers, callbacks and loops.
            storage_options: handed on to the CheckpointIO in `plugins`; the default one has no options.

        Raises:
            MisconfigurationException: no model is attached, or `storage_options` is given to the default CheckpointIO.
            CheckpointError: it could not be written; a file of that name is as it was.
        """
        if self._module is None:
            raise MisconfigurationException("save_checkpoint needs a model: call it during or after fit or validate.")
        with self._in_phase("checkpoint", str(filepath)):
            save = recorded(self._actions, "save_checkpoint", checkpoint_state.save)
            save(self, filepath, bool(weights_only), storage_options)
            if self._profiler is not None and os.path.isfile(filepath):
                self._profiler.wrote("checkpoint", str(filepath), os.path.getsize(filepath))

    def explain(self, model: LightningModule | None = None) -> str:
        """Everything that a training step does, in order: what is bound, who asked for it, how it is done.

        After or during a fit it describes that run; before one, pass the model.
        """
        if model is not None and (self.fit_loop.plans is None or self._module is not model):
            with borrow_model(self, model) as module:
                check_fit(self, module)
                self._configure_optimizers(module)
                plans = Plans(self, module)
                return "\n".join([plans.explain(), *self._explain_run()])
        if self.fit_loop.plans is None:
            raise MisconfigurationException("Nothing has run yet: pass the model, trainer.explain(model).")
        return "\n".join([self.fit_loop.plans.explain(), *self._explain_run()])

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, above the progress bar where there is one; from one process of each machine."""
        if self.local_rank != 0:
            return
        bar = self.progress_bar_callback
        if bar is not None and hasattr(bar, "print"):
            bar.print(*args, **kwargs)
        else:
            print(*args, **kwargs)


def _run_launched(trainer: Trainer, method: str, given: tuple[Any, ...]) -> Any:
    """What runs in each process that a launcher has started, and in this one beside them."""
    with trainer.strategy.launched():
        return getattr(trainer, method)(*given)


def _of_kind(plugins: list[Any], kind: type) -> Any:
    """The plugin of that kind, or None."""
    return next((plugin for plugin in plugins if isinstance(plugin, kind)), None)
