"""What every strategy is: how a model spreads over devices and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lit_fast.checkpoint.plugins import CheckpointIO, TorchCheckpointIO
from lit_fast.distributed.flights import PHASE, Flights

if TYPE_CHECKING:
    from lit_fast.module import LightningModule
    from lit_fast.optim.configure import LRSchedulerConfig
    from lit_fast.optim.lightning_optimizer import LightningOptimizer
    from lit_fast.precision import Precision
    from lit_fast.strategies.control import Control
    from lit_fast.strategies.environments import ClusterEnvironment
    from lit_fast.trainer import Trainer

Backward = Callable[[Tensor], None]


class SkipInit(TorchFunctionMode):
    """Inside, the functions of `torch.nn.init` that can be intercepted leave tensors as they were allocated.

    The time for values that a checkpoint overwrites is saved, and no random number is drawn for them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class Strategy:
    """Who holds the model and its optimizers, what the Trainer asks around a run, and what callbacks ask for.

    A strategy's constraints are attributes of its class. What it adds to a step it is asked for once, when the plan is
    bound: `bind_backward`, `before_step`, `after_step`.

    Args:
        accelerator: the kind of device; the Trainer sets it.
        checkpoint_io: who writes, reads and removes checkpoint files; local files in torch's format when left out.
        precision_plugin: how a step computes; the Trainer sets it.
    """

    strategy_name = ""
    world_size = num_processes = num_nodes = 1
    global_rank = local_rank = node_rank = 0
    is_global_zero = True
    is_distributed = False
    distributed_sampler_kwargs: dict[str, Any] | None = None
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    handles_gradient_accumulation = False
    rides = True  # whether what processes agree on travels with the gradients; else it is asked for between steps
    shards_gradients = False  # whether optimizers hold this process's part of the gradients alone
    has_engine = False  # of somebody else's, for backward and steps: losses come to it divided by their window's length
    root_device: torch.device
    cluster_environment: ClusterEnvironment | None = None  # None on one device: nobody asked for one
    control: Control | None = None  # what several processes agree on
    flights: Flights | None = None  # what a profiler is told of collectives, while it records
    # The phases of what it times then.
    phases: ClassVar[dict[str, str]] = {"backward": "backward", "clip_gradients": "optimizer"}

    def __init__(
        self, accelerator: Any = None, checkpoint_io: CheckpointIO | None = None, precision_plugin: Any = None
    ) -> None:
        self.accelerator = accelerator
        self.precision_plugin = precision_plugin
        self.checkpoint_io: CheckpointIO = checkpoint_io or TorchCheckpointIO()
        self.lightning_module: LightningModule | None = None
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self._lightning_optimizers: list[LightningOptimizer] = []

    def precision_for(self, given: Precision) -> Precision:
        """The precision of its runs, where `given` is what the Trainer was asked for."""
        return given

    @property
    def model(self) -> LightningModule | None:
        """What runs the forward pass: the module itself, since nothing wraps it here."""
        return self.lightning_module

    def connect(self, model: LightningModule) -> None:
        self.lightning_module = model

    # -- a run, in the order in which the Trainer asks

    @property
    def launcher(self) -> Any:
        """What starts the other processes; None where there are none to start, or inside one that was started."""
        return None

    @contextmanager
    def launched(self) -> Iterator[None]:
        """Inside, this is one of the processes that `launcher` has started: it is None here."""
        yield

    def watch(self, timed: Callable[..., Callable[..., Any]], flights: Flights) -> None:
        """Have a profiler time what is asked of this strategy, until `unwatch`: `timed(phase, function, part)`."""
        self.flights = flights
        for name, phase in self.phases.items():
            setattr(self, name, timed(phase, getattr(self, name), name if phase == PHASE else None))

    def unwatch(self) -> None:
        """No longer."""
        self.flights = None
        for name in self.phases:
            vars(self).pop(name, None)

    def setup_environment(self) -> None:
        """Find the other processes and this one's device. Before any hook runs."""

    def setup(self, trainer: Trainer) -> None:
        """Lay the model out, on its device or devices, once `configure_model` has made it."""
        self.model_to_device()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """What the optimizers need to know of the layout, once `configure_optimizers` has returned them."""

    def refresh(self) -> None:
        """Before training and each epoch: what is trained may have changed."""

    def bind_step(self, step: Callable[..., Any], reduces: bool) -> Callable[..., Any]:
        """`training_step` with what comes before each forward; `reduces` as in `bind_backward`."""
        return step

    def bind_evaluation_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same for a step of validation, test or prediction."""
        return step

    def bind_backward(self, backward: Backward, reduces: bool) -> Backward:
        """Backward of a micro-batch; `reduces` in the last one of its window, whose gradients are stepped with."""
        return backward

    def bind_update(self, optimizer: Optimizer, update: Callable[..., Any]) -> Callable[..., Any]:
        """`update(grad_scale=1.0)`, an optimizer's step, with what belongs to it."""
        return update

    def shared_norm(self, optimizer: Optimizer) -> Callable[..., Tensor] | None:
        """`norm(grad_scale=1.0)` of the gradients of which `optimizer` holds parts; None where it has all of them."""
        return None

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Any) -> None:
        """Clip an optimizer's gradients in place."""
        self.precision_plugin.clip_gradients(optimizer, clip_val, algorithm)

    @torch.no_grad()
    def multiply_gradients(self, parameters: Iterable[Tensor], factor: float | Tensor) -> None:
        """Make gradients a window's mean, before the step; without waiting for a factor on the device."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names for whatever optimizers step."""
        assert self.lightning_module is not None, "no model is connected"
        return self.lightning_module.named_parameters()

    def param_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Its param groups, with the model's own parameters."""
        return optimizer.param_groups

    def before_step(self) -> tuple[Callable[[], None], ...]:
        """What runs between the last backward of a window and the hooks before the optimizer's step."""
        return ()

    def on_exception(self, error: BaseException) -> None:
        """The run ends by `error`: tell the other processes."""

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        """(point of the step, who, what it does) for `Trainer.explain`."""
        return iter(())

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Tensors made inside are on this device, in the dtype of the precision; see `Trainer.init_module`."""
        with ExitStack() as stack:
            stack.enter_context(self.root_device)
            stack.enter_context(self.precision_plugin.tensor_init_context())
            if empty_init:
                stack.enter_context(SkipInit())
            yield

    def model_to_device(self) -> None:
        assert self.lightning_module is not None, "no model is connected"
        self.lightning_module.to(self.root_device)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The batch on `device` (the strategy's own where None), through the module's transfer hooks where it has a
        module."""
        target = self.root_device if device is None else device
        if self.lightning_module is not None:
            return self.lightning_module._apply_batch_transfer_handler(batch, target, dataloader_idx)
        from lit_fast.data.transfer import move

        return move(batch, target)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Backward as a plugin sees it: its three methods in order, with the hooks that they run."""
        module, precision = self.lightning_module, self.precision_plugin
        closure_loss = precision.pre_backward(closure_loss, module)
        precision.backward(closure_loss, module, optimizer, *args, **kwargs)
        return cast(Tensor, precision.post_backward(closure_loss, module))

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """One step of `optimizer` with its closure, by the precision."""
        return self.precision_plugin.optimizer_step(optimizer, model or self.lightning_module, closure, **kwargs)

    # -- state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None, "no model is connected"
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None, "no model is connected"
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        self.checkpoint_io.remove_checkpoint(filepath)

    def explain_failure(self, error: BaseException, phase: str) -> BaseException:
        """What to raise in the place of an exception that ends a run; `phase` says where, as in "in trainer.fit"."""
        return error

    def teardown(self) -> None:
        """The end of a run, whole or broken off."""
        self.checkpoint_io.teardown()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        optimizer.load_state_dict(dict(state))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self.load_optimizer_state(optimizer, state)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, backward gathers gradients in this process only."""
        yield

    # -- collectives: the identity in one process

    def barrier(self, name: str | None = None) -> None:
        """Wait until every process has come here."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object that process `src` gave, in every process."""
        return obj

    def of_first(self, function: Callable[[], Any]) -> Any:
        """What `function` returns in the first process, which alone calls it; its error is raised in all of them."""
        return function()

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The "mean", "sum", "min" or "max" over all processes' tensors, in every process."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Every process's tensor, shape (processes, ...)."""
        return tensor

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every process's object by rank, in the first process; in the others an empty list."""
        return [obj]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all (or any) of the processes say so."""
        return decision
