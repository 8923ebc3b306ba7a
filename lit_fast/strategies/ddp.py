"""Every process has the whole model and a part of the data; the gradients of all are averaged while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_fast.checkpoint.plugins import CheckpointIO
from lit_fast.distributed.buckets import GradientBuckets
from lit_fast.distributed.learning import DEFAULT_SIZES, MEBIBYTE, BucketSizes
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.parallel import BROADCAST_BYTES, ParallelStrategy, broadcast_coalesced
from lit_fast.strategies.strategy import Backward

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

# Options of torch's DistributedDataParallel that need nothing here: what they switch on is always so.
_ALWAYS = ("find_unused_parameters", "gradient_as_bucket_view", "static_graph", "check_reduction", "device_ids")
_COMPRESSED = {"fp16_compress_hook": torch.float16, "bf16_compress_hook": torch.bfloat16}


class DDPStrategy(ParallelStrategy):
    """Data parallel: `Trainer(strategy="ddp", devices=4)`.

    Gradients travel in buckets (`distributed/buckets.py`). Parameters that get no gradient are no error: where no
    process has one, `p.grad` stays None.

    Args:
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
        timeout: as of `ParallelStrategy`.
        ddp_comm_hook: torch's `bf16_compress_hook` or `fp16_compress_hook`, which are `wire_dtype` here.
        wire_dtype: in which gradients travel, "bfloat16" or "float16"; their own dtype where None.
        start_method: "popen" runs the program once more for each process; "spawn", "fork" and "forkserver" run the
            Trainer's method in processes of Python's multiprocessing.
        bucket_cap_mb: mebibytes in a bucket; 25 where only the next one is given. Where neither is, the first
            steps are measured, four or, with Gloo, seven, and buckets are as long as backward and the network want
            them (`distributed/learning.py`).
        first_bucket_mb: mebibytes in the bucket that backward fills first; 1 where only `bucket_cap_mb` is given.
        broadcast_buffers: before each forward in training, buffers become those of the first process.
        ddp_kwargs: further options of torch's DistributedDataParallel: find_unused_parameters, static_graph and
            gradient_as_bucket_view, which change nothing here.

    Raises:
        MisconfigurationException: an option of torch's that there is not here.

    Example::

        Trainer(devices=2, strategy=DDPStrategy(bucket_cap_mb=50))
    """

    strategy_name = "ddp"

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Any = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "popen",
        *,
        wire_dtype: str | torch.dtype | None = None,
        bucket_cap_mb: float | None = None,
        first_bucket_mb: float | None = None,
        broadcast_buffers: bool = True,
        **ddp_kwargs: Any,
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
        )
        unknown = sorted(set(ddp_kwargs) - set(_ALWAYS))
        torchs = {"ddp_comm_wrapper": ddp_comm_wrapper, "model_averaging_period": model_averaging_period}
        unknown += [name for name, given in torchs.items() if given is not None]
        hook = getattr(ddp_comm_hook, "__name__", None)
        if ddp_comm_hook is not None and hook not in _COMPRESSED:
            unknown.append("ddp_comm_hook")
        if unknown:
            raise MisconfigurationException(
                f"DDPStrategy({', '.join(f'{name}=...' for name in unknown)}): strategy='ddp' is ours, and has no such "
                f"option; TorchDDPStrategy (strategy='ddp_torch') hands every option of torch's "
                f"DistributedDataParallel on."
            )
        self.wire_dtype = _COMPRESSED[hook] if hook is not None else _dtype(wire_dtype)
        given = (first_bucket_mb, bucket_cap_mb)
        sizes = [size if mb is None else int(mb * MEBIBYTE) for mb, size in zip(given, DEFAULT_SIZES, strict=True)]
        self._sizes = None if given == (None, None) else BucketSizes(*sizes)
        self.broadcast_buffers = broadcast_buffers
        self.buckets: GradientBuckets | None = None
        self._blocked = False
        self._reduced = False  # whether the window's gradients have been

    # -- a run

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self.world_size > 1:
            self.same_model_everywhere()

    def refresh(self) -> None:
        """Buckets for the parameters that are trained now."""
        if self.world_size == 1:
            return
        assert self.lightning_module is not None
        trained = {name: p for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        if self.buckets is not None:
            had = self.buckets.params
            if len(trained) == len(had) and all(a is b for a, b in zip(had, trained.values(), strict=True)):
                return
            self.buckets.remove_hooks()
        self.buckets = None
        if trained:
            self.buckets = GradientBuckets(
                list(trained.values()),
                self.group,
                sizes=self._sizes,
                wire_dtype=self.wire_dtype,
                riders=self.control,
                names=list(trained),
            )
            if self.flights is not None:
                self.buckets.watch(self.flights)

    def bind_backward(self, backward: Backward, reduces: bool) -> Backward:
        if self.world_size == 1 or not reduces:
            return backward

        def reducing(loss: Tensor) -> None:
            buckets = self.buckets
            if buckets is None or self._blocked:
                return backward(loss)
            buckets.begin()
            backward(loss)
            buckets.finish()
            self._reduced = True

        flights = self.flights
        if flights is None:
            return reducing

        def told(loss: Tensor) -> None:
            flights.backward_begins()
            reducing(loss)

        return told

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        if self.world_size == 1:
            return
        dtype = str(self.wire_dtype).removeprefix("torch.")
        wire = "" if self.wire_dtype is None else f", as {dtype} summed in float32"
        yield "backward", "DDPStrategy", f"averaged over {self.world_size} processes, bucket by bucket{wire}"
        if self._sends_buffers:
            yield "training_step", "DDPStrategy", "first, buffers become those of the first process"

    @property
    def _sends_buffers(self) -> bool:
        module = self.lightning_module
        return self.broadcast_buffers and module is not None and next(module.buffers(), None) is not None

    def before_step(self) -> tuple[Callable[[], None], ...]:
        return (self._take_part,) if self.world_size > 1 else ()

    def _take_part(self) -> None:
        """A process whose `training_step` returned no loss still takes part in what the others send."""
        if not self._reduced and self.buckets is not None and not self._blocked:
            self.buckets.begin()
            self.buckets.finish()
        self._reduced = False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        before, self._blocked = self._blocked, True
        try:
            yield
        finally:
            self._blocked = before

    def teardown(self) -> None:
        if self.buckets is not None:
            self.buckets.remove_hooks()
            self.buckets = None
        super().teardown()

    def bind_step(self, step: Callable[..., Any], reduces: bool) -> Callable[..., Any]:
        """`training_step` behind the broadcast of buffers."""
        module = self.lightning_module
        assert module is not None, "no model is connected"
        if self.world_size == 1 or not self._sends_buffers:
            return step

        send = broadcast_coalesced if self.flights is None else self.flights.timed(broadcast_coalesced, "buffers")

        def with_buffers(*args: Any) -> Any:
            if self._blocked:
                return step(*args)
            send(self.group, [b.detach() for b in module.buffers()], BROADCAST_BYTES, 0)
            return step(*args)

        return with_buffers


def _dtype(given: Any) -> torch.dtype | None:
    allowed: dict[Any, torch.dtype | None] = {None: None}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        allowed[dtype] = allowed[str(dtype).removeprefix("torch.")] = dtype
    if given not in allowed:
        raise MisconfigurationException(
            f"DDPStrategy(wire_dtype={given!r}): allowed are None (the gradients' own), 'float32', 'bfloat16' and "
            f"'float16'."
        )
    return allowed[given]
