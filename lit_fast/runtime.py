"""What surrounds the loop in every run: attaching, preparing, rare hooks, logging, teardown.

`Runtime` is the inner half of `Trainer`; nothing in it runs once per step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lit_fast.callbacks.callback import Callback
from lit_fast.checkpoint import finding
from lit_fast.checkpoint import state as checkpoint_state
from lit_fast.data.samplers import distribute
from lit_fast.defaults import in_order, is_kind
from lit_fast.errors import MisconfigurationException, PossibleUserWarning
from lit_fast.hooks import is_overridden
from lit_fast.interrupts import Interrupts
from lit_fast.metrics import MetricLog, to_float
from lit_fast.model_checks import check_hooks
from lit_fast.module import LightningModule
from lit_fast.optim.configure import LRSchedulerConfig, parse_optimizers
from lit_fast.optim.grad_dtype import keep_gradients_in
from lit_fast.plan import Plans
from lit_fast.profiled import Profiled
from lit_fast.profiler.manual import time_manual
from lit_fast.rank_zero import rank_zero_info
from lit_fast.seed import seed_workers
from lit_fast.states import RunningStage, TrainerFn, TrainerStatus

if TYPE_CHECKING:
    import torch

    from lit_fast.config import TrainerConfig
    from lit_fast.trainer import Trainer


class Runtime(Interrupts, Profiled):
    """The inner half of `Trainer`."""

    if TYPE_CHECKING:
        callbacks: list[Any]
        config: TrainerConfig
        datamodule: Any
        _data_owner: Any
        _at_run_end: ExitStack
        _pending_metrics: dict[str, Any] | None
        _pending_rng: dict[str, Any] | None
        _ckpt_path: str | None
        _weights_only: bool | None
        _ckpt_path_was_set: bool

        def __getattr__(self, name: str) -> Any: ...

    @property
    def _trainer(self) -> Trainer:
        """This object under the name that the rooms below take it by."""
        return cast("Trainer", self)

    # -- the frame of a run

    def _begin(self, fn: TrainerFn) -> None:
        self.state.fn, self.state.status = fn, TrainerStatus.RUNNING
        self._use_device(self.strategy.root_device)
        if self._shared is not None:
            self._shared.begin(self._agreed)
        stage = RunningStage.TRAINING if fn == TrainerFn.FITTING else RunningStage(fn.value)
        self.state.stage = stage
        self._evaluation = self._loop_of(fn)
        self._should_stop, self._interrupt, self._terminated = False, None, False
        if fn == TrainerFn.FITTING:
            self._settle_limits()
        self._same_versions()
        if self._profiler is not None:
            self._profiler.start(self._trainer)
            self._at_run_end.callback(self._profiler.stop)
            self._profiler.watch(self.strategy)
            self._at_run_end.callback(self.strategy.unwatch)
        if self._actions is not None:
            self._actions._lightning_module = self._module
            rank = self.strategy.global_rank if self.strategy.world_size > 1 else None
            self._actions.setup(stage=fn.value, local_rank=rank, log_dir=self.log_dir)
        self._metric_log.begin_run(stage.value, self.strategy)

    def _use_device(self, device: torch.device) -> None:
        if device != self.config.device:
            self.config = replace(self.config, device=device)

    def _settle_limits(self) -> None:
        """Limits that were left open: 1,000 epochs, unless something else ends the fit."""
        loop = self.fit_loop
        if loop.max_epochs is None:
            ends = loop.max_steps != -1 or any(is_kind(callback, "Timer") for callback in self.callbacks)
            loop.max_epochs = -1 if ends else 1000
            if not ends:
                warnings.warn(
                    "Trainer(max_epochs=...) was not given, nor max_steps or max_time: the fit ends after 1000 epochs. "
                    "Set max_epochs=-1 to train without a limit.",
                    category=PossibleUserWarning,
                    stacklevel=5,
                )
        if loop.min_epochs is None:
            loop.min_epochs = 0 if loop.min_steps is None else 1  # min_steps holds back a stop before the first step

    def _use_data(self, datamodule: Any, **sources: Any) -> None:
        if datamodule is not None and any(source is not None for source in sources.values()):
            raise MisconfigurationException("Both a datamodule and dataloaders were passed; pass one of them.")
        self._data_owner = datamodule  # whose loaders and transfer hooks this run takes
        if datamodule is not None:
            self.datamodule = datamodule  # stays, with its other hooks, in later runs that are given loaders
            datamodule.trainer = self
        self._sources = sources
        self.fit_loop.loader = None
        for loop in (self.fit_loop.epoch_loop.val_loop, self.validate_loop, self.test_loop, self.predict_loop):
            loop.combined = None

    def _prepare(self, module: LightningModule, stage: str, ckpt_path: Any, weights_only: bool | None) -> Any:
        """Everything from `configure_callbacks` to a restored model, in Lightning's order; returns the checkpoint."""
        check_hooks(self._trainer, module, self.state.fn)
        if self._ckpt_path_was_set and ckpt_path is not None:
            warnings.warn(
                f"trainer.ckpt_path was set to {self._ckpt_path!r}, and {stage}(ckpt_path={ckpt_path!r}) was called: "
                f"the latter is loaded. Give one of them.",
                stacklevel=3,
            )
            self._ckpt_path_was_set = False
        elif self._ckpt_path_was_set:
            ckpt_path = self._ckpt_path
        self._ckpt_path = None if ckpt_path is None else str(ckpt_path)  # callbacks look at it in `setup`
        self._attach_model_callbacks(module)
        for owner in (self.datamodule, module):
            if owner is not None:
                self._prepare_data(owner)
        if self.datamodule is not None:
            self._hook(self.datamodule, "setup")(self.state.fn)
        for callback in self.callbacks:
            self._hook(callback, "setup")(self, module, self.state.fn)
        self._hook(module, "setup")(self.state.fn)
        module.configure_sharded_model()
        module.configure_model()
        if self._layer_sync is not None and self.strategy.world_size > 1:
            self._layer_sync.apply(module)
            self._at_run_end.callback(self._layer_sync.revert, module)
        self.precision_plugin.convert_module(module)  # before weights are loaded: float64 ones lose nothing then
        self._ckpt_path = self.strategy.of_first(lambda: finding.find(self._trainer, ckpt_path))
        self._weights_only = weights_only
        return None if self.strategy.restore_checkpoint_after_setup else self._restore_model(module)

    def _set_up_strategy(self, module: LightningModule, checkpoint: Any) -> Any:
        """Lay the model out; where it holds only a part of itself from here on, load the checkpoint only now."""
        self.strategy.setup(self._trainer)
        return self._restore_model(module) if self.strategy.restore_checkpoint_after_setup else checkpoint

    def _restore_model(self, module: LightningModule) -> Any:
        """The checkpoint that the run begins from, once the model has its weights; None where there is none."""
        path = self._ckpt_path
        if path is None:
            return None
        checkpoint = self.strategy.load_checkpoint(path, weights_only=self._weights_only)
        checkpoint_state.restore_model(self._trainer, checkpoint, path)
        return checkpoint

    def _prepare_data(self, owner: Any) -> None:
        """Once on each machine, or once at all; nobody goes on before it is done."""
        strategy = self.strategy
        if strategy.global_rank == 0 or (owner.prepare_data_per_node and strategy.local_rank == 0):
            owner.prepare_data()
        strategy.barrier("prepare_data")

    def _same_versions(self) -> None:
        """Loggers that number their folders: all processes take the number that the first one has found."""
        numbered = [logger for logger in self.loggers if is_kind(logger, "FolderLogger")]
        if numbered and self.strategy.world_size > 1:
            found = self.strategy.of_first(lambda: [logger.version for logger in numbered])
            for logger, version in zip(numbered, found, strict=True):
                logger.use_version(version)

    def _attach_model_callbacks(self, module: LightningModule) -> None:
        for callback in self.callbacks:
            callback.log, callback.log_dict = module.log, module.log_dict
        own = self._hook(module, "configure_callbacks")()
        own = [own] if isinstance(own, Callback) else list(own or [])
        for callback in own:
            if not isinstance(callback, Callback):
                raise MisconfigurationException(
                    f"{type(module).__name__}.configure_callbacks returned {type(callback).__name__}; allowed are "
                    f"objects of classes that derive from lit_fast.Callback."
                )
        replaced = tuple({type(callback) for callback in self.callbacks} - {Callback})
        replaced = tuple(kind for kind in replaced if any(isinstance(callback, kind) for callback in own))
        if replaced:
            rank_zero_info(
                "%s.configure_callbacks takes the place of these callbacks of the Trainer: %s.",
                type(module).__name__,
                ", ".join(sorted(kind.__name__ for kind in replaced)),
            )
        kept = [callback for callback in self.callbacks if type(callback) not in replaced]
        self.callbacks = in_order([*kept, *own])
        for callback in own:
            callback.log, callback.log_dict = module.log, module.log_dict

    def _begin_fit(self, module: LightningModule, checkpoint: Any) -> None:
        """From the model on its device to a bound plan, right before the first epoch."""
        if self._progress.stage != "start":  # the last fit was interrupted: its epoch begins anew
            self._progress.stage = "start"
        checkpoint = self._set_up_strategy(module, checkpoint)
        self._configure_optimizers(module)
        self._connect_precision(module)
        self.strategy.setup_optimizers(self._trainer)
        plans = self.fit_loop.plans = Plans(self._trainer, module)
        if self._profiler is not None and not module.automatic_optimization:
            schedulers = [config.scheduler for config in self.lr_scheduler_configs]
            self._at_run_end.callback(time_manual(self._profiler, module, schedulers))
        self._memory_note = self._keep_freed_memory()
        self._call("on_fit_start")
        if self.config.grad_dtype is not None:  # now that nobody makes other parameters any more
            self._at_run_end.callback(keep_gradients_in(self.config.grad_dtype, module.parameters()))
        plans.refresh()
        self._log_hyperparameters(module)
        if checkpoint is not None:
            checkpoint_state.restore_training(self._trainer, checkpoint)
        mid_epoch = self._progress.stage in ("batch", "stepped", "validated", "scheduled")
        if self.enable_validation and self.config.num_sanity_val_steps and not mid_epoch:
            self.fit_loop.epoch_loop.val_loop.sanity_check()
        if self._pending_metrics is not None:
            self._metric_log.load_state_dict(self._pending_metrics, module)
            self._pending_metrics = None
        resting = [name for name, child in module.named_modules() if not child.training]
        if resting:
            warnings.warn(
                f"{len(resting)} modules are in evaluation mode as training starts (the first is "
                f"{resting[0] or type(module).__name__!r}): dropout and batch norm stay off there. "
                f"Call model.train() before fit to train them.",
                category=PossibleUserWarning,
                stacklevel=3,
            )
        self._metric_log.epoch_end = True  # what is logged before the first step is of the epoch
        self.fit_loop.setup_data()
        every = self.config.check_val_every_n_epoch
        if self.enable_validation and (every is None or (self._progress.epoch + 1) % every == 0):
            self._stage = "validate"
            if self.val_dataloaders is None:
                self.fit_loop.epoch_loop.val_loop.setup_data()
            self._stage = "train"

    def _end_fit(self, module: LightningModule) -> None:
        self._call("on_fit_end")
        self._tear_down(module)

    def _tear_down(self, module: LightningModule) -> None:
        stage = self.state.fn  # equal to its value, "fit" or another
        if self.datamodule is not None:
            self._hook(self.datamodule, "teardown")(stage)
        for callback in self.callbacks:
            self._hook(callback, "teardown")(self, module, stage)
        self._hook(module, "teardown")(stage)
        self.precision_plugin.teardown()
        for logger in self.loggers:
            logger.finalize("success")
        if self._actions is not None:
            self._actions.describe()

    def _failed(self, error: BaseException) -> None:
        """An exception ends the run: whoever asked is told, and what was logged is written."""
        self.state.status = TrainerStatus.INTERRUPTED
        if self._profiler is not None:
            self._profiler.failed(error)
        if self.state.fn == TrainerFn.FITTING:
            self.fit_loop.note_exception(error)
        module = self._module
        for callback in self.callbacks:
            self._hook(callback, "on_exception")(self, module, error)
        if self.datamodule is not None:
            self.datamodule.on_exception(error)
        for logger in self.loggers:
            logger.finalize("failed")

    def _configure_optimizers(self, module: LightningModule) -> None:
        returned = self._hook(module, "configure_optimizers")()
        optimizers, schedulers = parse_optimizers(returned, module.automatic_optimization)
        self.strategy.optimizers, self.strategy.lr_scheduler_configs = optimizers, schedulers
        if not self.optimizers and module.automatic_optimization:
            warnings.warn(
                f"{type(module).__name__}.configure_optimizers returned no optimizer: nothing will be trained.",
                stacklevel=2,
            )

    def _connect_precision(self, module: LightningModule) -> None:
        """A precision plugin may want other optimizers or schedulers than the module returned."""
        strategy = self.strategy
        _, strategy.optimizers, strategy.lr_scheduler_configs = self.precision_plugin.connect(
            module, strategy.optimizers, strategy.lr_scheduler_configs
        )

    def _scheduler_step(self, config: LRSchedulerConfig) -> Callable[..., None]:
        """One step of a scheduler, through the module's hook only where it is overridden."""
        module, scheduler, progress = self.lightning_module, config.scheduler, self._progress
        if is_overridden("lr_scheduler_step", module, LightningModule):
            log, table = self._metric_log, self._metric_log.table("lr_scheduler_step", "train")

            def overridden(metric: Any = None) -> None:
                log.current = table
                module.lr_scheduler_step(scheduler, metric)
                progress.scheduled += 1

            return self._recorded("lr_scheduler_step", overridden)

        def advance(metric: Any = None) -> None:
            scheduler.step() if metric is None else scheduler.step(metric)
            progress.scheduled += 1

        return self._recorded("lr_scheduler_step", advance)

    def _keep_freed_memory(self) -> str:
        if not self.config.keep_freed_memory:
            return "left as it was (keep_freed_memory=False)"
        if self.config.device.type != "cpu":
            return "not touched: the device has an allocator of its own"
        from lit_fast import ops

        return str(ops.keep_freed_memory(True))

    def _explain_run(self) -> list[str]:
        lines = [f"  {'allocator':<26} {'lit_fast':<24} {getattr(self, '_memory_note', 'asked at fit start')}"]
        position = self.fit_loop.position
        if position is not None and hasattr(position, "explain"):
            lines.append(f"  {'resume':<26} {'DataPosition':<24} {position.explain()}")
        return lines

    # -- hooks outside the step

    def _call(self, name: str, *args: Any) -> None:
        """One hook that runs rarely: callbacks first, then the module."""
        self._call_callbacks(name, *args)
        self._call_module(name, *args)

    def _call_callbacks(self, name: str, *args: Any, only: Callable[[Callback], bool] | None = None) -> None:
        log = self._metric_log
        for callback in self.callbacks:
            if (only is None or only(callback)) and name in callback.live_hooks(self):
                log.current = log.table(name)
                self._hook(callback, name)(self, self._module, *args)

    def _call_module(self, name: str, *args: Any) -> None:
        log = self._metric_log
        log.current = log.table(name)
        self._hook(self._module, name)(*args)

    def _call_epoch_end(self, name: str) -> None:
        """Callbacks that watch a metric come after the module, which may log it in this very hook."""
        self._call_callbacks(name, only=lambda callback: not _watches_a_metric(callback))
        self._call_module(name)
        self._metric_log.share()
        self._call_callbacks(name, only=_watches_a_metric)

    def _run_step_hooks(self, name: str, *args: Any) -> None:
        """Hooks of the step where the module or a plugin decides when they run."""
        assert self.fit_loop.plans is not None
        log = self._metric_log
        before = log.current
        for hook in self.fit_loop.plans.binding.step_hooks[name]:
            hook(*args)
        log.current = before

    def _bound_hooks(self, name: str, stage: str, suffix: str = "") -> tuple[Callable[..., Any], ...]:
        """The live hooks of a batch of `stage`, bound once per loader."""
        log, module = self._metric_log, self.lightning_module
        table = log.table(name, stage, suffix)

        def bind(hook: Callable[..., Any], *fixed: Any) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                log.current = table
                return hook(*fixed, *args)

            return call

        listening = (callback for callback in self.callbacks if name in callback.live_hooks(self))
        bound = [self._timed(c, name, bind(self._method(c, name), self, module)) for c in listening]
        if is_overridden(name, module, LightningModule):
            bound.append(self._timed(module, name, bind(self._method(module, name))))
        return tuple(bound)

    # -- data

    def _datamodule_overrides(self, name: str) -> bool:
        if self._data_owner is None:
            return False
        from lit_fast.data.datamodule import LightningDataModule

        return is_overridden(name, self._data_owner, LightningDataModule)

    def _defines_loader(self, name: str) -> bool:
        """Whether there is data of that name: passed, or from the datamodule or the module."""
        return (
            self._sources.get(name) is not None
            or self._datamodule_overrides(name)
            or is_overridden(name, self._module, LightningModule)
        )

    def _request_loader(self, name: str) -> Any:
        source = self._sources.get(name)
        if source is None:
            owner = self._data_owner if self._datamodule_overrides(name) else self.lightning_module
            source = self._hook(owner, name)()
        seed_workers(source, self._trainer.global_rank)
        return source

    def _distribute(self, loaders: list[Any], stage: str, name: str) -> list[Any]:
        """What this process reads of each loader; see `data.samplers.distribute`."""
        config = self.config
        share = self._trainer.distributed_sampler_kwargs if config.use_distributed_sampler else None
        once = self.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)
        return distribute(loaders, stage, name, share, overfit=bool(config.overfit_batches), once=once)

    def _data_hook(self, name: str) -> Callable[..., Any] | None:
        """A transfer hook, where the datamodule or the module overrides it."""
        if self._datamodule_overrides(name):
            return self._hook(self._data_owner, name)
        module = self.lightning_module
        if not is_overridden(name, module, LightningModule):
            return None
        return self._hook(module, name)

    def _batch_receivers(self, log: MetricLog, stage: str, dataloader_idx: int = 0) -> tuple[Callable[[Any], Any], ...]:
        """What happens to a batch between the loader and the step: nothing, on the CPU in full precision."""
        device, precision = self.config.device, self.precision_plugin
        receivers: list[Callable[[Any], Any]] = []
        if precision.converts_input:
            receivers.append(precision.convert_input)
        before = self._data_hook("on_before_batch_transfer")
        transfer = self._data_hook("transfer_batch_to_device")
        after = self._data_hook("on_after_batch_transfer")

        def hook(function: Callable[..., Any], name: str, *args: Any) -> Callable[[Any], Any]:
            table = log.table(name, stage)

            def call(batch: Any) -> Any:
                log.current = table
                return function(batch, *args, dataloader_idx)

            return call

        if before is not None:
            receivers.append(hook(before, "on_before_batch_transfer"))
        if transfer is not None:
            receivers.append(hook(transfer, "transfer_batch_to_device", device))
        elif device.type != "cpu":
            from lit_fast.data.transfer import move

            receivers.append(lambda batch: move(batch, device))
        if after is not None:
            receivers.append(hook(after, "on_after_batch_transfer"))
        return tuple(receivers)

    def _to_device_ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches on the device, copied on a side stream; the next one while a step runs, where nobody can see it.

        That is: no transfer hook is overridden, and fetching draws no random numbers in this process (workers do it).
        """
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device")
        if any(self._data_hook(name) is not None for name in hooks) or self.precision_plugin.converts_input:
            return batches
        from lit_fast.data.transfer import PrefetchToDevice

        ahead = int(self.fit_loop.position.prefetch_safe)
        return PrefetchToDevice(batches, self.config.device, ahead=ahead)

    # -- logging

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Send values to every logger, under `step`, a logged "step", or the number of optimizer steps taken."""
        if not metrics or not self.loggers:
            return
        with self._in_phase("logging"):
            values = {name: to_float(value, name) for name, value in metrics.items()}
            if step is None and "step" in values:
                step = int(values.pop("step"))
            elif step is None:
                values.setdefault("epoch", self.current_epoch)
                step = self.fit_loop.windows_completed()
            for logger in self.loggers:
                with self._in_phase("logging", type(logger).__name__):
                    logger.log_metrics(values, step=step)
                    logger.save()

    def _log_hyperparameters(self, module: LightningModule) -> None:
        if not self.config.enable_autolog_hparams:
            return
        merged: dict[str, Any] = {}
        for owner in (self.datamodule, module):
            if owner is not None and getattr(owner, "_log_hyperparams", False):
                given = owner.hparams_initial
                differing = [key for key in given if key in merged and not _same(given[key], merged[key])]
                if differing and self.loggers:
                    raise MisconfigurationException(
                        f"{type(module).__name__} and its datamodule both saved hyperparameters named "
                        f"{', '.join(map(repr, differing))}, with different values, and a logger can show one. Rename "
                        f"one, or save_hyperparameters(logger=False) in one of them."
                    )
                merged.update(given)
        for logger in self.loggers:
            if merged:
                logger.log_hyperparams(merged)
            logger.log_graph(module)
            logger.save()

    # -- resuming

    def _restore_rng(self) -> None:
        """Random number generators as a checkpoint holds them, at the last moment before the first step."""
        if self._pending_rng is not None:
            from lit_fast.checkpoint import rng

            rng.restore(self._pending_rng)
            self._pending_rng = None

    @property
    def _stage(self) -> str:
        stage = self.state.stage
        return "" if stage is None else stage.value

    @_stage.setter
    def _stage(self, stage: str) -> None:
        self.state.stage = RunningStage(stage)


def _same(a: Any, b: Any) -> bool:
    """Whether two hyperparameters are equal; tensors and arrays, which compare by element, by identity."""
    try:
        return a is b or bool(a == b)
    except (ValueError, RuntimeError):
        return False


def _watches_a_metric(callback: Callback) -> bool:
    return any(base.__name__ in ("Checkpoint", "EarlyStopping") for base in type(callback).__mro__)
