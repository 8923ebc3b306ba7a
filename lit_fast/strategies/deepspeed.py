"""The deepspeed package under our Trainer, where it is installed: its engine runs forward, backward and the step."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_fast.checkpoint.plugins import CheckpointIO
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.module import LightningModule
from lit_fast.optim.engine import EngineOptimizer
from lit_fast.optim.mapping import mapping_of
from lit_fast.optim.storage import asks_for_storage
from lit_fast.precision import DeepSpeedPrecision, HalfPrecision, MixedPrecision, Precision
from lit_fast.states import TrainerFn
from lit_fast.strategies import deepspeed_config
from lit_fast.strategies.ddp_torch import Step
from lit_fast.strategies.deepspeed_state import OptimizerParts, fill_masters, masters_of, whole_parameters
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.model_parallel import join_alone
from lit_fast.strategies.parallel import ParallelStrategy
from lit_fast.strategies.strategy import Backward

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class DeepSpeedStrategy(ParallelStrategy):
    """`Trainer(strategy="deepspeed")`: DeepSpeed's ZeRO, a thin pass to `deepspeed.initialize`.

    The module and the optimizer of `configure_optimizers` become a DeepSpeed engine, made when a fit begins. The
    Trainer keeps its loop, hooks, schedulers, data and checkpoints: one file in our format, which every other strategy
    loads, at any number of processes.

    Args:
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
        timeout, start_method: as of `ParallelStrategy`.
        zero_optimization: False is an error: strategy="ddp" has nothing in parts.
        stage: what processes hold parts of: 1, the optimizer's states; 2, gradients too; 3, parameters too.
        offload_optimizer, offload_parameters: keep them in the CPU's memory (`offload_parameters` with stage 3).
        pin_memory: of what is offloaded.
        contiguous_gradients, overlap_comm, allgather_partitions, reduce_scatter, allgather_bucket_size,
        reduce_bucket_size, sub_group_size: DeepSpeed's, in "zero_optimization"; sizes count elements.
        zero_allow_untested_optimizer: take optimizers that DeepSpeed does not know.
        loss_scale, initial_scale_power, loss_scale_window, hysteresis, min_loss_scale: DeepSpeed's, in "fp16".
        config: DeepSpeed's configuration, a dictionary or the path of a JSON file; then none of the options above.
        logging_level: of DeepSpeed's logger.

    Raises:
        MisconfigurationException: deepspeed is not installed; an option that there is not, or that config says.

    Example::

        Trainer(devices=8, precision="bf16-mixed", strategy=DeepSpeedStrategy(stage=2, reduce_bucket_size=50_000_000))
    """

    strategy_name = "deepspeed"
    rides = False
    shards_gradients = True
    has_engine = True

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "popen",
        *,
        zero_optimization: bool = True,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        pin_memory: bool = False,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000,
        sub_group_size: int = 1_000_000_000_000,
        zero_allow_untested_optimizer: bool = True,
        loss_scale: float = 0.0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        logging_level: int = logging.WARNING,
        **others: Any,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise MisconfigurationException(
                "DeepSpeedStrategy: the package deepspeed is not installed here: pip install deepspeed. Without it, "
                "'zero1' has states in parts, and 'fsdp2' parameters, gradients and states."
            )
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend,
            timeout,
            start_method,
        )
        if others:
            raise MisconfigurationException(
                f"DeepSpeedStrategy({', '.join(f'{name}=...' for name in others)}): there is no such option; "
                f"DeepSpeed's own are given as config={{...}}."
            )
        if config is None:
            zero: dict[str, Any] = {
                "stage": stage if zero_optimization else 0,
                "contiguous_gradients": contiguous_gradients,
                "overlap_comm": overlap_comm,
                "allgather_partitions": allgather_partitions,
                "reduce_scatter": reduce_scatter,
                "allgather_bucket_size": allgather_bucket_size,
                "reduce_bucket_size": reduce_bucket_size,
                "sub_group_size": sub_group_size,
            }
            for kind, offloaded in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
                if offloaded:
                    zero[kind] = {"device": "cpu", "pin_memory": pin_memory}
            self.config: dict[str, Any] = {
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": zero_allow_untested_optimizer,
                "zero_force_ds_cpu_optimizer": False,
            }
        else:
            self.config = deepspeed_config.read(config)
        self.stage = deepspeed_config.stage_of(self.config)
        self._fp16 = {
            "loss_scale": loss_scale,
            "initial_scale_power": initial_scale_power,
            "loss_scale_window": loss_scale_window,
            "hysteresis": hysteresis,
            "min_loss_scale": min_loss_scale,
        }
        self._logging_level = logging_level
        self.engine: Any = None  # of the last fit
        self._parts: OptimizerParts | None = None
        self._masters: Mapping[str, Tensor] | None = None  # of a checkpoint, until there is an engine
        self._trained: list[nn.Parameter] = []
        self._pending_factor: float | Tensor = 1.0  # for the gradients, at the next step
        self._reduced = False  # whether the window's last backward has run
        self._is_open = False  # whether the engine holds gradients of an open window

    @property
    def deepspeed_engine(self) -> Any:
        """DeepSpeed's engine; None before a fit."""
        return self.engine

    def precision_for(self, given: Precision) -> Precision:
        if type(given) is Precision or isinstance(given, DeepSpeedPrecision):
            return given
        own_scaler = False
        if isinstance(given, MixedPrecision) and given.scaler is not None:
            own_scaler = given.scaler.state_dict() != torch.amp.GradScaler(given.device).state_dict()
        if type(given) not in (MixedPrecision, HalfPrecision) or own_scaler:
            raise MisconfigurationException(
                f"strategy='deepspeed' with precision {given.precision!r} by {type(given).__name__}"
                f"{' with a scaler of its own' if own_scaler else ''}: DeepSpeed's engine computes in its own way; "
                f"allowed are the names '32-true', 'bf16-mixed', 'bf16-true', '16-mixed' and '16-true'."
            )
        return DeepSpeedPrecision(given.precision)

    # -- a run

    def setup_environment(self) -> None:
        super().setup_environment()
        join_alone(self)

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if self._in_parts and self.engine is not None and trainer.state.fn != TrainerFn.FITTING:
            return  # the engine gathers weights where they are used
        self._refuse_parts()
        super().setup(trainer)
        dtype = getattr(self.precision_plugin, "dtype", None)
        if dtype is not None:
            for p in module.parameters():
                if p.is_floating_point():
                    p.data = p.data.to(dtype)  # as DeepSpeed itself does; buffers stay as they are
        if self.world_size > 1:
            self.same_model_everywhere()

    @property
    def _in_parts(self) -> bool:
        """Whether stage 3 has replaced the module's parameters by parts of them, which only its engine can gather."""
        assert self.lightning_module is not None
        return any(hasattr(p, "ds_id") for p in self.lightning_module.parameters())

    def _refuse_parts(self) -> None:
        if self._in_parts:
            name = type(self.lightning_module).__name__
            raise MisconfigurationException(
                f"strategy='deepspeed' with stage 3: {name} is still in the parts that a fit has made of it. "
                f"Make it anew, with a Trainer, and load what that fit has saved."
            )

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the engine."""
        self._let_go()
        optimizer = self._only_optimizer(trainer)
        deepspeed = self._import()
        module = self.lightning_module
        assert module is not None
        max_norm = trainer.gradient_clip_val or None
        config = deepspeed_config.complete(self.config, self.precision_plugin.precision, max_norm, self._fp16)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        parts = OptimizerParts(optimizer, self.stage)
        masters = masters_of(module, self._masters or {})
        index = self.root_device.index
        with _local_rank(self.local_rank):
            self.engine, zero, _, _ = deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank if index is None else index),
                model=Step(module),
                model_parameters=self._trained,
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
        self._parts = parts
        parts.take(zero)
        fill_masters(module, masters)
        if isinstance(self.precision_plugin, DeepSpeedPrecision):
            self.precision_plugin.loss_scaler = getattr(zero, "loss_scaler", None)
        self.optimizers = [EngineOptimizer(optimizer, self._step, zero.zero_grad)]

    def _only_optimizer(self, trainer: Trainer) -> Optimizer:
        """What `configure_optimizers` returned, where DeepSpeed can step it.

        Raises:
            MisconfigurationException: it cannot, or the Trainer is asked for what DeepSpeed does otherwise.
        """
        module = trainer.lightning_module
        name = type(module).__name__
        overridden = [
            hook
            for hook in ("backward", "configure_gradient_clipping", "clip_gradients")
            if is_overridden(hook, module, LightningModule)
        ]
        why = ""
        if not module.automatic_optimization:
            why = f"{name} optimizes manually, and the engine runs backward and step; set automatic_optimization = True"
        elif overridden:
            why = f"{name} overrides {', '.join(overridden)}, which the engine does by itself; leave them out"
        elif len(self.optimizers) != 1:
            why = f"{name}.configure_optimizers returned {len(self.optimizers)} optimizers; DeepSpeed takes one"
        elif trainer.gradient_clip_algorithm == "value" and trainer.gradient_clip_val:
            why = "DeepSpeed clips by norm alone; leave gradient_clip_algorithm='value' out"
        elif trainer.config.nonfinite != "propagate":
            why = (
                f"nonfinite={trainer.config.nonfinite!r} is not asked by the engine, which leaves out steps whose norm "
                f"is not finite; leave it out"
            )
        elif trainer.config.grad_dtype is not None:
            why = "the engine accumulates gradients; in place of grad_dtype give config={'data_types': ...}"
        if why:
            raise MisconfigurationException(f"strategy='deepspeed': {why}, or use strategy='ddp' or 'zero1'.")
        optimizer = self.optimizers[0]
        kind, (mapping, _) = type(optimizer).__name__, mapping_of(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            why = "it evaluates the loss several times a step"
        elif isinstance(optimizer, torch.optim.Adagrad):
            why = "DeepSpeed makes another one in its place, with the same options for all param groups"
        elif mapping is not None and mapping.whole_tensors:
            why = "it looks at whole tensors, of which DeepSpeed hands it parts"
        elif any(map(asks_for_storage, optimizer.param_groups)):
            why = "it stores its states in a way of its own, and DeepSpeed hands it float32 parts of all parameters"
        if why:
            raise MisconfigurationException(
                f"strategy='deepspeed' cannot step {kind}: {why}. Use another optimizer, such as torch.optim.AdamW, or "
                f"strategy='ddp'."
            )
        return optimizer

    def _import(self) -> Any:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        deepspeed.utils.logging.logger.setLevel(self._logging_level)
        found, wanted = get_accelerator().device_name(), self.root_device.type
        if found != wanted:
            raise MisconfigurationException(
                f"strategy='deepspeed': DeepSpeed has chosen the accelerator {found!r}, and the Trainer {wanted!r}. "
                f"Set DS_ACCELERATOR={wanted} in the environment before the program starts."
            )
        return deepspeed

    def refresh(self) -> None:
        """What is trained may not change under an engine."""
        if self.engine is None:
            return
        assert self.lightning_module is not None
        trained = [p for p in self.lightning_module.parameters() if p.requires_grad]
        had = self._trained
        if len(trained) != len(had) or any(a is not b for a, b in zip(trained, had, strict=True)):
            raise MisconfigurationException(
                "strategy='deepspeed': other parameters are trained now than when the fit began, and the engine was "
                "made for those. Freeze and unfreeze before the fit, or use strategy='ddp'."
            )

    # -- a step

    def bind_step(self, step: Callable[..., Any], reduces: bool) -> Callable[..., Any]:
        engine = self.engine
        if engine is None:
            return step

        def through_engine(*args: Any) -> Any:
            engine.module.step = step
            engine.set_gradient_accumulation_boundary(reduces)
            return engine(*args)

        return through_engine

    def bind_evaluation_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Parameters in parts are gathered by the engine's hooks; whole ones need none."""
        engine = self.engine
        if engine is None or self.stage < 3:
            return step

        def through_engine(*args: Any) -> Any:
            engine.module.step = step
            return engine(*args)

        return through_engine

    def bind_backward(self, backward: Backward, reduces: bool) -> Backward:
        engine = self.engine
        if engine is None:
            return backward

        def by_engine(loss: Tensor) -> None:
            engine.backward(loss)
            self._reduced, self._is_open = reduces, not reduces

        return by_engine

    def before_step(self) -> tuple[Callable[[], None], ...]:
        return (self._must_have_reduced,) if self.engine is not None else ()

    def _must_have_reduced(self) -> None:
        if not self._reduced:
            raise MisconfigurationException(
                "strategy='deepspeed': training_step returned no loss in the last micro-batch of a step, and the other "
                "processes wait for its gradients. Return one from every batch, such as 0.0 * loss, or use "
                "strategy='ddp'."
            )
        self._reduced = False

    def multiply_gradients(self, parameters: Iterable[Tensor], factor: float | Tensor) -> None:
        self._pending_factor = self._pending_factor * factor

    def bind_update(self, optimizer: Optimizer, update: Callable[..., Any]) -> Callable[..., Any]:
        return update if self.engine is None else self._step

    def _step(self, grad_scale: float | Tensor = 1.0, **kwargs: Any) -> None:
        """The engine's step on gradients times `grad_scale`."""
        factor, self._pending_factor = self._pending_factor * grad_scale, 1.0
        if not isinstance(factor, Tensor) and factor == 1.0:
            self.engine.step(**kwargs)
            return
        # Gradients lie in the engine's buffers, by stage: what can be given is the scale that it takes off them.
        zero = self.engine.optimizer
        if not hasattr(zero, "custom_loss_scaler"):
            raise MisconfigurationException(
                f"strategy='deepspeed': a short window, or one of weighted losses, wants its gradients scaled, and "
                f"{type(zero).__name__} has no scale; leave 'data_types' out of config, or use stage 2."
            )
        before = zero.custom_loss_scaler, zero.external_loss_scale
        zero.custom_loss_scaler, zero.external_loss_scale = True, zero.loss_scale / float(factor)
        try:
            self.engine.step(**kwargs)
        finally:
            zero.custom_loss_scaler, zero.external_loss_scale = before

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        yield "training_step", "deepspeed", f"through DeepSpeed's engine, ZeRO stage {self.stage}"
        yield "backward", "deepspeed", f"engine.backward averages over {self.world_size} processes"
        yield (
            "update",
            "deepspeed",
            "engine.step: clips by norm, and calls the optimizer's own step on parts",
        )

    # -- state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole, and in float32 where the engine keeps masters. All processes must call it."""
        state = super().lightning_module_state_dict()
        if self.engine is None or (self.stage < 3 and self.precision_plugin.precision == "32-true"):
            return state
        assert self.lightning_module is not None
        return whole_parameters(self.lightning_module, state, keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._refuse_parts()
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        if self.engine is not None:
            assert self.lightning_module is not None
            fill_masters(self.lightning_module, checkpoint["state_dict"])
        if self.precision_plugin.precision != "32-true":
            self._masters = checkpoint["state_dict"]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """All of it in the first process; in the others without the states of parameters. All must call it."""
        if self._parts is None:
            return super().optimizer_state(optimizer)
        return self._parts.state_dict(keep=self.is_global_zero)

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        if self._parts is None:
            super().load_optimizer_state(optimizer, state)
        else:
            self._parts.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._is_open and self.stage > 1:
            warnings.warn(
                "This checkpoint is written inside a window of accumulated gradients, which DeepSpeed keeps to itself: "
                "they are not saved, and a run that goes on from here misses them in its first step. Save between "
                "windows: make val_check_interval or every_n_train_steps a multiple of accumulate_grad_batches.",
                stacklevel=3,
            )
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # -- the end

    def teardown(self) -> None:
        """Gradients are the program's again; what a checkpoint is made of stays until the next run."""
        if self.engine is not None:
            for hook in getattr(self.engine.optimizer, "_grad_acc_hooks", ()):
                hook.remove()
        self._masters = None
        super().teardown()

    def _let_go(self) -> None:
        engine, self.engine, self._parts = self.engine, None, None
        self._reduced, self._is_open, self._pending_factor = False, False, 1.0
        if engine is not None:
            engine.destroy()


@contextmanager
def _local_rank(rank: int) -> Iterator[None]:
    """LOCAL_RANK in the environment, where DeepSpeed reads it and nobody may have set it."""
    missing = "LOCAL_RANK" not in os.environ
    if missing:
        os.environ["LOCAL_RANK"] = str(rank)
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]
