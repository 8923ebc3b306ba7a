"""The model is split over the processes, by the module itself: DTensors on a mesh of devices, and torch's FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_fast.checkpoint import sharded
from lit_fast.distributed.flights import put_method
from lit_fast.errors import MisconfigurationException
from lit_fast.states import TrainerFn
from lit_fast.strategies.parallel import ParallelStrategy
from lit_fast.strategies.strategy import Backward

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lit_fast.trainer import Trainer


class SplitModelStrategy(ParallelStrategy):
    """What strategies share whose processes hold parts of the model: forward through FSDP2, and checkpoints.

    Args:
        save_distributed_checkpoint: a checkpoint is a directory that all processes write; False: one file, for which
            the first process gathers everything.
    """

    rides = False
    restore_checkpoint_after_setup = True

    def __init__(self, *args: Any, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self._syncs = True  # whether the next backward reduces
        self._unwatch: list[Callable[[], None]] = []

    def watch_fsdp(self) -> None:
        """Tell a profiler, where there is one, what FSDP2 gathers and scatters: once the model is split.

        Sums over the copies of a model in parts (a mesh of two dimensions), and what DTensors send, stay in the
        phase in which they are.
        """
        comms: dict[int, tuple[Any, str, str]] = {}
        for module in _fsdp_modules(self.lightning_module) if self.flights is not None else ():
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
                for collective, what in (("all_gather", "parameters"), ("reduce_scatter", "gradients")):
                    comm = getattr(group, f"_{collective}_comm", None)  # torch 2.8 has none: they stay in their phase
                    if comm is not None:
                        comms[id(comm)] = comm, collective, what
        for comm, collective, what in comms.values():
            assert self.flights is not None
            timed = self.flights.sending(comm.__call__, collective, what)
            self._unwatch.append(put_method(comm, "__call__", timed))

    def unwatch(self) -> None:
        super().unwatch()
        while self._unwatch:
            self._unwatch.pop()()

    # -- a step

    def bind_step(self, step: Callable[..., Any], reduces: bool) -> Callable[..., Any]:
        return self._through_fsdp(step)

    def bind_evaluation_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return self._through_fsdp(step)

    def _through_fsdp(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` with what FSDP2 does before and after a forward, where the module itself is one of its."""
        from torch.distributed.fsdp import FSDPModule

        module = self.lightning_module
        if not isinstance(module, FSDPModule):
            return step
        state = module._get_fsdp_state()

        def inside(*args: Any) -> Any:  # as torch's `register_fsdp_forward_method` wraps a method
            args, _ = state._pre_forward(module, args, {})
            return state._post_forward(module, args, step(*args))

        return inside

    def bind_backward(self, backward: Backward, reduces: bool) -> Backward:
        """Only a window's last micro-batch reduces; before it gradients are gathered unsharded."""
        if not _fsdp_modules(self.lightning_module):
            return backward

        def synced(loss: Tensor) -> None:
            if self._syncs is not reduces:
                self._set_sync(reduces)
            backward(loss)

        return synced

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        before = self._syncs
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(before)

    def _set_sync(self, reduces: bool) -> None:
        self._syncs = reduces
        for module in _fsdp_modules(self.lightning_module):
            module.set_requires_gradient_sync(reduces, recurse=False)

    # -- state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By parameter names and in parts, for a directory; by numbers and whole, for a file."""
        from lit_fast.checkpoint import slices

        assert self.lightning_module is not None
        if self.save_distributed_checkpoint:
            return slices.by_name(optimizer, {p: name for name, p in self.lightning_module.named_parameters()})
        whole: dict[str, Any] = slices.whole_of(optimizer.state_dict(), keep=self.is_global_zero)
        return whole

    def lightning_module_state_dict(self) -> dict[str, Any]:
        from lit_fast.checkpoint import slices

        state = super().lightning_module_state_dict()
        if self.save_distributed_checkpoint:
            return state
        whole: dict[str, Any] = slices.whole_of(state, keep=self.is_global_zero)
        return whole

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from lit_fast.checkpoint import slices

        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {
            name: slices.part_of(value, own[name]) if isinstance(own.get(name), Tensor) else value
            for name, value in given.items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        from lit_fast.checkpoint import slices

        super().load_optimizer_state(optimizer, slices.parts_of_state(state, optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        from lit_fast.checkpoint import slices

        self._warn_of_open_window()
        held = ("state_dict", "optimizer_states") if self.save_distributed_checkpoint else ()
        rest = {key: slices.whole_of(value) for key, value in checkpoint.items() if key not in held}
        if not self.save_distributed_checkpoint:
            super().save_checkpoint(rest, filepath, storage_options)
            return
        if storage_options is not None:
            raise MisconfigurationException(
                f"save_checkpoint(storage_options={storage_options!r}): a sharded checkpoint is a local directory, "
                f"written without a CheckpointIO; leave it out, or save_distributed_checkpoint=False."
            )
        parts = {key: checkpoint[key] for key in held if key in checkpoint}
        several = self.world_size > 1
        sharded.save({**rest, **parts}, filepath, self.broadcast, self.global_rank, several)

    def _warn_of_open_window(self) -> None:
        module = self.lightning_module
        if module is None or self._syncs or not _fsdp_modules(module) or module.trainer.state.fn != TrainerFn.FITTING:
            return
        warnings.warn(
            "This checkpoint is written inside a window of accumulated gradients, which FSDP2 keeps to itself: they "
            "are not saved, and a run that goes on from here misses them in its first step. Save between windows: make "
            "val_check_interval or every_n_train_steps a multiple of accumulate_grad_batches.",
            stacklevel=4,
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a sharded checkpoint this process's parts, once the model is split; a file as it is, mapped from disk."""
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        safe = weights_only is not False
        if sharded.is_sharded(checkpoint_path):
            own = {**module.state_dict(), **dict(module.named_parameters())}
            share = (self.global_rank, self.world_size)
            return sharded.load(checkpoint_path, safe, own.get, optimizers=fitting, share=share)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        modules = len(_fsdp_modules(self.lightning_module))
        if modules:
            yield "training_step", "torch", f"FSDP2 gathers the weights of {modules} modules before their forward"
            yield "backward", "torch", "FSDP2 scatters the gradients in the last micro-batch of a window"


class ModelParallelStrategy(SplitModelStrategy):
    """The module lays itself out in `configure_model`, on `self.device_mesh`: tensor parallel, FSDP2, or both.

    Args:
        data_parallel_size: processes between which the data is shared out; "auto": those that are left.
        tensor_parallel_size: processes that work on the same data; "auto": one machine's.
        save_distributed_checkpoint: as of `SplitModelStrategy`.
        process_group_backend, timeout: as of `ParallelStrategy`.

    Raises:
        MisconfigurationException: the two sizes do not multiply to the number of processes; the module has no
            `configure_model` that lays it out.

    Example::

        class Model(lit_fast.LightningModule):
            def configure_model(self):
                parallelize_module(self.mlp, self.device_mesh["tensor_parallel"], {"0": ColwiseParallel(), ...})
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        Trainer(devices=4, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2))
    """

    strategy_name = "model_parallel"

    def __init__(
        self,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self._sizes = (data_parallel_size, tensor_parallel_size)
        self._device_mesh: DeviceMesh | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """Of the dimensions "data_parallel" and "tensor_parallel"; there once the processes have met."""
        if self._device_mesh is None:
            raise MisconfigurationException(
                "ModelParallelStrategy.device_mesh: the mesh is made when a run begins, before configure_model."
            )
        return self._device_mesh

    def sizes(self) -> tuple[int, int]:
        """Processes in the mesh's two dimensions."""
        data, tensor = self._sizes
        if tensor == "auto":
            tensor = self.num_processes if data == "auto" else self.world_size // max(1, int(data))
        if data == "auto":
            data = self.world_size // max(1, int(tensor))
        data, tensor = int(data), int(tensor)
        if data < 1 or tensor < 1 or data * tensor != self.world_size:
            raise MisconfigurationException(
                f"ModelParallelStrategy(data_parallel_size={self._sizes[0]!r}, tensor_parallel_size="
                f"{self._sizes[1]!r}): the two must multiply to the number of processes, {self.world_size}; here they "
                f"are {data} and {tensor}."
            )
        return data, tensor

    def setup_environment(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        sizes = self.sizes()
        super().setup_environment()
        if self._device_mesh is None:
            join_alone(self)
            names = ("data_parallel", "tensor_parallel")
            self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:  # type: ignore[override]
        """The data is shared out over the data-parallel dimension: tensor-parallel processes see the same."""
        if self._device_mesh is None:
            return super().distributed_sampler_kwargs
        mesh = self._device_mesh["data_parallel"]
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()} if self.world_size > 1 else None

    def setup(self, trainer: Trainer) -> None:
        from torch.distributed.tensor import DTensor

        module = self.lightning_module
        assert module is not None
        if not any(isinstance(p, DTensor) for p in module.parameters()):
            raise MisconfigurationException(
                f"strategy=ModelParallelStrategy(): {type(module).__name__} has no parameter that is split. Lay the "
                f"model out in configure_model, with parallelize_module or fully_shard on self.device_mesh; or use "
                f"strategy='fsdp2', which does it by itself."
            )
        materialize(module, self.root_device)
        self.model_to_device()
        self.watch_fsdp()


def join_alone(strategy: ParallelStrategy) -> None:
    """A process group of one, where there is only one process: DTensors want some."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if strategy.world_size == 1 and not dist.is_initialized():
        dist.init_process_group(strategy.backend, store=HashStore(), rank=0, world_size=1)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Memory and first values for what was made under `torch.device("meta")`, by each layer's `reset_parameters`.

    Raises:
        MisconfigurationException: a layer has parameters on "meta" and no `reset_parameters`.
    """
    made: dict[Tensor, Any] = {}
    for name, layer in module.named_modules():
        own = [*layer._parameters.items(), *layer._buffers.items()]
        waiting = [key for key, tensor in own if tensor is not None and tensor.is_meta]
        if not waiting:
            continue
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if reset is None:
            raise MisconfigurationException(
                f"{name or type(module).__name__} ({type(layer).__name__}) has {', '.join(waiting)} on the device "
                f"'meta', and no method reset_parameters() that gives them their first values: define one."
            )
        for key in waiting:
            table: dict[str, Any] = layer._parameters if key in layer._parameters else layer._buffers
            tensor = table[key]
            if tensor not in made:
                there = torch.empty_like(tensor, device=device)
                made[tensor] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
            table[key] = made[tensor]
        reset()


def _fsdp_modules(module: nn.Module | None) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [] if module is None else [child for child in module.modules() if isinstance(child, FSDPModule)]
