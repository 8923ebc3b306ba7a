"""Every process holds a part of each parameter, gradient and state: torch's FSDP2, applied block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from lit_fast.checkpoint.plugins import CheckpointIO
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.model_parallel import SplitModelStrategy, join_alone, materialize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    from lit_fast.trainer import Trainer

# Which modules are sharded as one: classes of them, or a function (module, its name) -> bool, or a number of parameters
# from which on a module is one.
Wrap: TypeAlias = "Iterable[type[nn.Module]] | Callable[[nn.Module, str], bool] | int"


class FSDP2Strategy(SplitModelStrategy):
    """`Trainer(strategy="fsdp2")`: torch's `fully_shard` on the module's blocks and on the module itself.

    A block's weights are gathered before its forward and its backward, and dropped after. A module that
    `configure_model` has sharded itself is left as it is.

    Args:
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
        timeout, start_method: as of `ParallelStrategy`.
        auto_wrap_policy: which modules are sharded as one block: a set of classes, a function (module, name) -> bool,
            or the number of parameters from which on a module is one. None: the modules in every `nn.ModuleList`.
        mixed_precision: torch's `MixedPrecisionPolicy`; None: what `Trainer(precision=...)` asks for ("bf16-mixed":
            weights are gathered in bfloat16, gradients summed in float32).
        cpu_offload: keep parameters, gradients and states in the CPU's memory (True, or torch's `CPUOffloadPolicy`).
        activation_checkpointing: modules whose forward runs again in backward, as of `auto_wrap_policy`.
        reshard_after_forward: drop a block's weights after its forward; an integer: keep this many processes' part.
            None is torch's default: all but the module itself.
        device_mesh: a mesh of torch's of one dimension, or of two: copies, and parts of each copy; or its sizes.
        save_distributed_checkpoint: a checkpoint is a directory that all processes write; False: one file.

    Raises:
        MisconfigurationException: precision "16-mixed", whose scaler FSDP2 has none for; a mesh that does not fit.

    Example::

        Trainer(devices=8, strategy=FSDP2Strategy(auto_wrap_policy={Block}, activation_checkpointing={Block}))
    """

    strategy_name = "fsdp2"

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
        auto_wrap_policy: Wrap | None = None,
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool | CPUOffloadPolicy | None = None,
        activation_checkpointing: Wrap | type[nn.Module] | None = None,
        reshard_after_forward: bool | int | None = None,
        device_mesh: DeviceMesh | tuple[int, ...] | None = None,
        save_distributed_checkpoint: bool = True,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend,
            timeout,
            start_method,
            save_distributed_checkpoint=save_distributed_checkpoint,
        )
        self._wrap, self._recompute = auto_wrap_policy, activation_checkpointing
        self._mixed_precision, self._cpu_offload = mixed_precision, cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self._given_mesh = device_mesh
        self._mesh: DeviceMesh | None = None

    # -- a run

    def setup_environment(self) -> None:
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        super().setup_environment()
        if self._mesh is not None:
            return
        join_alone(self)
        given = self._given_mesh
        if isinstance(given, DeviceMesh):
            self._mesh = given
            return
        sizes = (self.world_size,) if given is None else tuple(given)
        if len(sizes) not in (1, 2) or torch.Size(sizes).numel() != self.world_size:
            raise MisconfigurationException(
                f"FSDP2Strategy(device_mesh={given!r}): allowed are one or two sizes, (copies, parts of each copy), "
                f"that multiply to the number of processes, {self.world_size}."
            )
        names = ("replicate", "shard")[-len(sizes) :]
        self._mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """Of the dimension "shard", or of "replicate" and "shard"; None before the first run."""
        return self._mesh

    def setup(self, trainer: Trainer) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        module = self.lightning_module
        assert module is not None
        if any(isinstance(child, FSDPModule) for child in module.modules()):  # by itself, or in a run before
            materialize(module, self.root_device)
        elif any(isinstance(p, DTensor) for p in module.parameters()):
            raise MisconfigurationException(
                f"strategy='fsdp2': {type(module).__name__} has split parameters before FSDP2 could: for a module that "
                f"lays itself out use ModelParallelStrategy."
            )
        else:
            self._shard(module)
        self.watch_fsdp()

    def _shard(self, module: nn.Module) -> None:
        """From the innermost blocks outwards, each made on the device just before: only one of them is whole."""
        from torch.distributed._composable.checkpoint_activation import checkpoint
        from torch.distributed.fsdp import fully_shard

        options = {
            "mesh": self._mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": self._policy(),
            "offload_policy": self._offload(),
        }
        recompute = () if self._recompute is None else _chosen(module, self._recompute)
        for child in recompute:
            checkpoint(child)
        for child in reversed([*_blocks(module, self._wrap), module]):
            if child is module:
                continue
            self._bring(child)
            fully_shard(child, **options)
        self._bring(module)
        fully_shard(module, **options)

    def _bring(self, part: nn.Module) -> None:
        """Values on the device, the first process's everywhere, for what is not sharded yet."""
        from itertools import chain

        from torch.distributed.tensor import DTensor

        from lit_fast.strategies.parallel import BROADCAST_BYTES, broadcast_coalesced

        materialize(part, self.root_device)
        whole = [t for t in chain(part.parameters(), part.buffers()) if not isinstance(t, DTensor)]
        for tensor in whole:
            tensor.data = tensor.data.to(self.root_device)
        if self.world_size > 1 and whole:
            broadcast_coalesced(self.group, [t.detach() for t in whole], BROADCAST_BYTES, 0)

    def _policy(self) -> MixedPrecisionPolicy:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self._mixed_precision is not None:
            return self._mixed_precision
        precision = self.precision_plugin.precision
        if precision == "16-mixed":
            raise MisconfigurationException(
                "Trainer(precision='16-mixed', strategy='fsdp2'): the scaler of float16 does not know split gradients; "
                "use precision='bf16-mixed', or '16-true', or strategy='ddp'."
            )
        if precision == "bf16-mixed":
            return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return MixedPrecisionPolicy()

    def _offload(self) -> Any:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        if self._cpu_offload is None or self._cpu_offload is False:
            return OffloadPolicy()
        if self._cpu_offload is True:
            return CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        return self._cpu_offload

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        yield from super().note_rows()
        if self._cpu_offload:
            yield "update", "torch", "in the CPU's memory, where parameters and states are kept"


def _blocks(module: nn.Module, wrap: Any) -> list[nn.Module]:
    """In the order of registration, outer ones first."""
    if wrap is not None:
        return _chosen(module, wrap)
    blocks = [child for holder in module.modules() if isinstance(holder, nn.ModuleList) for child in holder]
    return [child for child in dict.fromkeys(blocks) if next(child.parameters(), None) is not None]


def _chosen(module: nn.Module, wrap: Any) -> list[nn.Module]:
    below = [(name, child) for name, child in module.named_modules() if child is not module]
    holders = (nn.ModuleList, nn.ModuleDict)
    if isinstance(wrap, type):
        wrap = {wrap}
    if isinstance(wrap, bool) or not (isinstance(wrap, int) or callable(wrap) or isinstance(wrap, Iterable)):
        raise MisconfigurationException(
            f"FSDP2Strategy was given {wrap!r}; modules are chosen by a set of classes, a function (module, name) -> "
            f"bool, or a number of parameters."
        )
    if isinstance(wrap, int):
        return _by_size(module, wrap)
    if callable(wrap):
        chosen = [child for name, child in below if not isinstance(child, holders) and wrap(child, name)]
    else:
        kinds = tuple(wrap)
        chosen = [child for _, child in below if isinstance(child, kinds)]
        if not chosen:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise MisconfigurationException(
                f"FSDP2Strategy: there is no {names} in {type(module).__name__}; name classes of its layers."
            )
    return list(dict.fromkeys(chosen))


def _by_size(module: nn.Module, least: int) -> list[nn.Module]:
    """The smallest modules of at least that many parameters, without those of blocks inside them."""
    chosen: list[nn.Module] = []

    def left_over(part: nn.Module) -> int:
        left = sum(p.numel() for p in part.parameters(recurse=False)) + sum(map(left_over, part.children()))
        if part is module or isinstance(part, (nn.ModuleList, nn.ModuleDict)) or left < least:
            return left
        chosen.append(part)
        return 0

    left_over(module)
    in_order = {child: place for place, child in enumerate(module.modules())}
    return sorted(chosen, key=in_order.__getitem__)


_SHARDING = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD": True,
    "_HYBRID_SHARD_ZERO2": False,
}
_WITHOUT_MEANING = {
    "backward_prefetch": "FSDP2 gathers the next block's weights by itself",
    "forward_prefetch": "FSDP2 gathers the next block's weights by itself",
    "limit_all_gathers": "FSDP2 needs no such limit",
    "use_orig_params": "FSDP2 keeps the original parameters always",
    "sync_module_states": "the first process's weights are sent to all always",
    "ignored_modules": "call fully_shard in configure_model, and ModelParallelStrategy",
    "ignored_states": "call fully_shard in configure_model, and ModelParallelStrategy",
    "param_init_fn": "give the layers a method reset_parameters()",
    "process_group": "pass device_mesh",
}


class FSDPStrategy(FSDP2Strategy):
    """`Trainer(strategy="fsdp")`: `FSDP2Strategy` by the options of Lightning's FSDPStrategy.

    Args:
        cpu_offload, auto_wrap_policy, activation_checkpointing, device_mesh: as of `FSDP2Strategy`.
        mixed_precision: a `MixedPrecisionPolicy`; or FSDP1's `MixedPrecision`, whose dtypes are taken over.
        activation_checkpointing_policy: the name of `activation_checkpointing` for policies.
        sharding_strategy: "FULL_SHARD", "SHARD_GRAD_OP" (weights stay gathered until backward), "HYBRID_SHARD" (parts
            within `device_mesh`'s second dimension, copies over its first).
        state_dict_type: "full", one file, the default as in Lightning; or "sharded", a directory.

    Raises:
        MisconfigurationException: an option that FSDP2 does not have; the message says what there is instead.
    """

    strategy_name = "fsdp"

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Any = None,
        activation_checkpointing: Any = None,
        activation_checkpointing_policy: Any = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: str = "full",
        device_mesh: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            why = _WITHOUT_MEANING.get(name, "FSDP2 has no such option")
            raise MisconfigurationException(f"FSDPStrategy({name}=...): {why}; leave it out.")
        sharding = getattr(sharding_strategy, "name", sharding_strategy)
        if sharding not in _SHARDING:
            hint = "strategy='ddp' shards nothing" if sharding == "NO_SHARD" else f"allowed are {', '.join(_SHARDING)}"
            raise MisconfigurationException(f"FSDPStrategy(sharding_strategy={sharding!r}): {hint}.")
        if "HYBRID" in sharding and device_mesh is None:
            raise MisconfigurationException(
                f"FSDPStrategy(sharding_strategy={sharding!r}) needs device_mesh=(copies, parts of each copy)."
            )
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(
                f"FSDPStrategy(state_dict_type={state_dict_type!r}): allowed are 'full' and 'sharded'."
            )
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            raise MisconfigurationException(
                "FSDPStrategy: activation_checkpointing and activation_checkpointing_policy mean the same; pass one."
            )
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend,
            timeout,
            auto_wrap_policy=_policy_of_fsdp1(auto_wrap_policy),
            mixed_precision=_dtypes_of_fsdp1(mixed_precision),
            cpu_offload=getattr(cpu_offload, "offload_params", cpu_offload),
            activation_checkpointing=_policy_of_fsdp1(activation_checkpointing or activation_checkpointing_policy),
            reshard_after_forward=None if _SHARDING[sharding] else False,
            device_mesh=device_mesh,
            save_distributed_checkpoint=state_dict_type == "sharded",
        )


def _policy_of_fsdp1(policy: Any) -> Any:
    """FSDP1's policies: an object with the classes, `partial(transformer_auto_wrap_policy, transformer_layer_cls=...)`
    or `partial(size_based_auto_wrap_policy, min_num_params=...)`; ours are handed on."""
    if hasattr(policy, "_module_classes"):  # torch.distributed.fsdp.wrap.ModuleWrapPolicy
        return set(policy._module_classes)
    keywords = getattr(policy, "keywords", None)
    if keywords is not None and "transformer_layer_cls" in keywords:
        return set(keywords["transformer_layer_cls"])
    if keywords is not None and "min_num_params" in keywords:
        return int(keywords["min_num_params"])
    name = getattr(policy, "__name__", "")
    if name == "size_based_auto_wrap_policy":
        return 100_000_000  # as there by default
    if name == "always_wrap_policy":
        return lambda module, name: True
    return policy


def _dtypes_of_fsdp1(given: Any) -> Any:
    if given is None or not hasattr(given, "buffer_dtype"):
        return given
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=given.param_dtype, reduce_dtype=given.reduce_dtype)
