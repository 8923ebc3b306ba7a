"""`LightningModule`: a torch module that also says how it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_fast.core_hooks import CheckpointHooks, DataHooks, ModelHooks
from lit_fast.errors import MisconfigurationException
from lit_fast.export import Exportable
from lit_fast.hparams import HyperparametersMixin, class_only
from lit_fast.log_rules import refuse
from lit_fast.metrics import MetricLog
from lit_fast.states import GradClipAlgorithmType

if TYPE_CHECKING:
    from typing_extensions import Self

    from lit_fast.optim.lightning_optimizer import LightningOptimizer
    from lit_fast.trainer import Trainer


TOGGLES = ("toggle_optimizer", "untoggle_optimizer")  # timed on the module itself while a profiler records a fit


class LightningModule(Exportable, HyperparametersMixin, ModelHooks, DataHooks, CheckpointHooks, nn.Module):
    """A model with its training, validation and optimizer in one class, as in PyTorch Lightning.

    Override `training_step(batch, batch_idx)`, returning a loss (a scalar tensor, or a dict with the key "loss"),
    and `configure_optimizers()`. What is not overridden costs nothing in the step.

    Example::

        class Regressor(LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(32, 2)

            def training_step(self, batch, batch_idx):
                loss = self.layer(batch).square().mean()
                self.log("loss", loss, prog_bar=True)
                return loss

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-3)
    """

    # TorchScript leaves these out; it would call them while it looks for what to compile
    __jit_unused_properties__: ClassVar = [
        "example_input_array", "on_gpu", "current_epoch", "global_step", "global_rank", "local_rank", "logger",
        "loggers", "automatic_optimization", "trainer", "strict_loading", "device_mesh", "device", "dtype",
        *HyperparametersMixin.__jit_unused_properties__,
    ]  # fmt: skip

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, and knows none of these types
        _trainer: Trainer | None
        _metric_log: MetricLog | None
        _strict_loading: bool | None
        _example_input_array: Any

    _trainer = None
    _metric_log = None
    _automatic_optimization = True
    _strict_loading = None  # nobody has said
    _example_input_array = None
    _exporting = False

    # -- who and where

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module.

        Raises:
            RuntimeError: the module is not attached to a Trainer.
        """
        if self._trainer is None and not self._exporting:
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a Trainer; it is while trainer.fit(...) runs."
            )
        return self._trainer  # type: ignore[return-value]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for child in self.children():
            if isinstance(child, LightningModule):
                child.trainer = trainer
        self.__dict__["_trainer"] = trainer  # past nn.Module.__setattr__, which costs 1 us
        self.__dict__["_metric_log"] = None if trainer is None else trainer._metric_log

    @property
    def fabric(self) -> None:
        """None: the module runs under a Trainer."""

    @property
    def current_epoch(self) -> int:
        """Epochs finished so far (0 outside a run)."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far (0 outside a run)."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def global_rank(self) -> int:
        return self._trainer.global_rank if self._trainer is not None else 0

    @property
    def local_rank(self) -> int:
        return self._trainer.local_rank if self._trainer is not None else 0

    @property
    def device(self) -> torch.device:
        """Where the module's parameters live (the CPU where it has none)."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's floating-point parameters."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self._trainer.logger if self._trainer is not None else None

    @property
    def loggers(self) -> list[Any]:
        return self._trainer.loggers if self._trainer is not None else []

    @property
    def automatic_optimization(self) -> bool:
        """Whether the Trainer runs backward and the optimizer (True), or `training_step` does so itself."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, automatic: bool) -> None:
        self._automatic_optimization = automatic

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold exactly this module's keys."""
        return self._strict_loading is not False

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self._strict_loading = strict

    @property
    def example_input_array(self) -> Any:
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        self._example_input_array = example

    @property
    def device_mesh(self) -> Any:
        """The mesh of devices that a strategy laid the module out over; None on a single device."""
        return None if self._trainer is None else getattr(self._trainer.strategy, "device_mesh", None)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """What every process holds: tensors of shape (processes, ...), or the data itself in a single process.

        Args:
            data: a number, a tensor, or a collection of them; numbers become tensors.
            group: the processes to ask, all by default.
            sync_grads: whether gradients flow back to every process.
        """
        from torch.utils._pytree import tree_map

        def gather(value: Any) -> Any:
            if isinstance(value, bool | int | float):
                value = torch.tensor(value, device=self.device, dtype=torch.int32 if type(value) is int else None)
            gathered = self.trainer.strategy.all_gather
            return gathered(value, group=group, sync_grads=sync_grads) if isinstance(value, Tensor) else value

        return tree_map(gather, data)

    # -- logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log one number; it is read at once (queued on a GPU, without waiting), so later in-place changes are safe.

        Args:
            name: what it is called in the logger, on the bar, and as a monitored quantity.
            value: a number, a tensor with one element, or a torchmetrics Metric.
            prog_bar: show it on the progress bar.
            logger: send it to the loggers (they get it every `log_every_n_steps` steps).
            on_step: log each step's value; the default depends on the hook (True in `training_step`).
            on_epoch: log the epoch's reduction; the default depends on the hook (True in `validation_step`).
            reduce_fx: "mean", "sum", "min" or "max" over the epoch; a mean is weighted by `batch_size`.
            batch_size: samples that the value stands for; found in the batch when left out.
            add_dataloader_idx: with several validation loaders, append "/dataloader_idx_N" to the name.
            sync_dist: with several processes, what loggers and callbacks get is the reduction over all of them: of an
                epoch's values always, of single steps where a row is due. Every process must log the name then.
            sync_dist_group: of these processes only.
            rank_zero_only: it is logged in the first process only, so there is nothing to synchronize.
            enable_graph, metric_attribute: accepted as in Lightning; logged values never keep a graph.

        Raises:
            MisconfigurationException: not allowed in this hook, or called twice with different options.
            ValueError: the value is not a single number.
        """
        log = self._metric_log
        table = log.current if log is not None else None
        if log is None or table is None:
            return _warn_not_logging(self, name, value)
        options = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, enable_graph, rank_zero_only,
            metric_attribute, sync_dist, sync_dist_group,
        )  # fmt: skip
        slot = table.slots.get(name)
        if slot is None or slot.options != options:
            slot = log.declare(table, name, value, options, self, batch_size)
        slot.write(value, batch_size)

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log several values with the same options: `self.log_dict({"loss": loss, "accuracy": accuracy})`.

        A torchmetrics MetricCollection counts as a dictionary of its metrics, by names with its prefix and postfix.
        """
        several: Any = dictionary
        if hasattr(dictionary, "compute_groups"):  # a MetricCollection: the metrics, not copies of their states
            several = dict(several.items(keep_base=False, copy_state=False))
        for name, value in several.items():
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print from the first process only, above the progress bar."""
        if self.trainer.is_global_zero:
            self.trainer.print(*args, **kwargs)

    # -- what a user overrides

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        raise MisconfigurationException(f"{type(self).__name__} defines no training_step(batch, batch_idx).")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any: ...

    def test_step(self, *args: Any, **kwargs: Any) -> Any: ...

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """What `trainer.predict` returns of a batch; by default the module called with it."""
        return self(args[0] if args else kwargs["batch"])

    def configure_optimizers(self) -> Any:
        """Return an optimizer, `([optimizers], [schedulers])`, or a dict with "optimizer" and "lr_scheduler"."""

    def configure_callbacks(self) -> Any:
        return []

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """A batch through the three transfer hooks, to `device` (the module's own where None)."""
        batch = self.on_before_batch_transfer(batch, dataloader_idx)
        batch = self.transfer_batch_to_device(batch, self.device if device is None else device, dataloader_idx)
        return self.on_after_batch_transfer(batch, dataloader_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Override to run backward your own way; `loss` is divided by the accumulation window already."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Override to decide when and how the optimizer steps; the closure runs `training_step` and backward."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Override to clip your own way; `self.clip_gradients` does the ordinary clipping, in place."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | str | None = None,
    ) -> None:
        """Clip the gradients of one optimizer in place, by the Trainer's setting unless another is given.

        Raises:
            MisconfigurationException: the Trainer clips already, and otherwise; or an algorithm that does not exist.
            TypeError: the limit is no number.
        """
        trainer = self.trainer
        asked = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        chosen: dict[str, Any] = {"gradient_clip_val": 0.0, "gradient_clip_algorithm": "norm"}
        for name, given in asked.items():
            value, ours = given.lower() if isinstance(given, str) else given, getattr(trainer, name)
            if value is not None and ours is not None and value != ours:
                raise MisconfigurationException(
                    f"clip_gradients({name}={value!r}) contradicts Trainer({name}={getattr(ours, 'value', ours)!r}); "
                    f"leave the one in the Trainer out to choose it in the call."
                )
            chosen[name] = value if value is not None else ours if ours is not None else chosen[name]
        value, algorithm = chosen["gradient_clip_val"], chosen["gradient_clip_algorithm"]
        if not isinstance(value, int | float):
            raise TypeError(f"clip_gradients(gradient_clip_val={value!r}): allowed is a number.")
        if algorithm not in ("norm", "value"):
            raise MisconfigurationException(
                f"clip_gradients(gradient_clip_algorithm={algorithm!r}): allowed are 'norm' and 'value'."
            )
        trainer.strategy.clip_gradients(optimizer, value, GradClipAlgorithmType(algorithm))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    # -- manual optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Optimizer | LightningOptimizer | list[Any]:
        """The optimizer(s) from `configure_optimizers`, for manual optimization: one, or a list of several."""
        chosen = self.trainer.strategy._lightning_optimizers if use_pl_optimizer else self.trainer.optimizers
        return chosen[0] if len(chosen) == 1 else chosen

    def lr_schedulers(self) -> Any:
        """The scheduler(s) from `configure_optimizers`: None, one, or a list of several."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not schedulers else schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward for manual optimization, with the hooks and the precision of the Trainer."""
        if self.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward was called under automatic optimization; set self.automatic_optimization = False in "
                "the module's __init__, or return the loss from training_step."
            )
        self.trainer.strategy.backward(loss, None, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Until `untoggle_optimizer`, parameters that belong to the other optimizers alone require no gradient."""
        chosen = getattr(optimizer, "optimizer", optimizer)
        required: dict[nn.Parameter, bool] = {}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    required.setdefault(parameter, parameter.requires_grad)
                    parameter.requires_grad = False
        for group in chosen.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad = required[parameter]
        self.__dict__["_toggled"] = required

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Give every parameter back what `toggle_optimizer` took."""
        for parameter, requires_grad in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = requires_grad

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """`toggle_optimizer` for the length of a `with` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A module built with the hyperparameters of a checkpoint (`kwargs` override them), with its weights.

        Args:
            checkpoint_path: a file that a Trainer wrote, lit_fast's or Lightning's.
            map_location: where to put the tensors; by default the device they were saved from, or the CPU where there
                is none such.
            hparams_file: a .yaml or .csv file of hyperparameters, instead of those in the checkpoint.
            strict: whether the weights must match exactly; the module's `strict_loading` by default.
            weights_only: False executes pickled code in the file; only for a file that you trust.

        Raises:
            CheckpointError: missing, damaged, holding code, or of another model.
            MisconfigurationException: called on an instance; `strict` contradicts `strict_loading`; no such
                `hparams_file`.

        Example::

            model = Regressor.load_from_checkpoint("checkpoints/last.ckpt", width=128)
        """
        from lit_fast.checkpoint.build import load_module

        return load_module(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs)

    def freeze(self) -> Self:
        """Stop training: no gradients, evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self) -> Self:
        """Train again: gradients for all parameters, training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_trainer", None)  # a Trainer is not part of a model's copy
        state.pop("_metric_log", None)
        for name in TOGGLES:
            state.pop(name, None)
        return state


def _warn_not_logging(module: LightningModule, name: str, value: Any) -> None:
    refuse(value, name)
    if module._trainer is None:
        warnings.warn(
            f"self.log({name!r}, ...) does nothing: {type(module).__name__} is not attached to a Trainer.", stacklevel=3
        )
        return
    if module._trainer.barebones:
        warnings.warn(f"self.log({name!r}, ...) does nothing under Trainer(barebones=True).", stacklevel=3)
        return
    raise MisconfigurationException(
        f"self.log({name!r}, ...) was called outside of a step or epoch hook; call it while the Trainer runs one."
    )
