"""torch's own DistributedDataParallel under our Trainer, with every option: what our `ddp` is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_fast.checkpoint.plugins import CheckpointIO
from lit_fast.errors import MisconfigurationException
from lit_fast.strategies.environments import ClusterEnvironment
from lit_fast.strategies.parallel import ParallelStrategy
from lit_fast.strategies.strategy import Backward

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

_SET_HERE = ("self", "module", "device_ids", "process_group")


class Step(nn.Module):
    """A module whose forward is another one's training step: what DistributedDataParallel wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.step: Callable[..., Any] = module.forward

    def forward(self, *args: Any) -> Any:
        return self.step(*args)


class TorchDDPStrategy(ParallelStrategy):
    """`Trainer(strategy="ddp_torch")`: gradients are averaged by `torch.nn.parallel.DistributedDataParallel`.

    Args:
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
        timeout, start_method: as of `ParallelStrategy`.
        ddp_comm_hook: how a bucket is sent, as `register_comm_hook` takes it.
        ddp_comm_state: what that hook is given.
        ddp_comm_wrapper: makes another hook of it, such as `fp16_compress_wrapper`.
        model_averaging_period: with a `PostLocalSGDState`, steps between two averages of the weights.
        ddp_kwargs: every other option of DistributedDataParallel.

    Raises:
        MisconfigurationException: an option that DistributedDataParallel does not have.

    Example::

        Trainer(devices=2, strategy=TorchDDPStrategy(static_graph=True, bucket_cap_mb=50))
    """

    strategy_name = "ddp_torch"
    rides = False

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
        known = set(inspect.signature(DistributedDataParallel.__init__).parameters).difference(_SET_HERE)
        unknown = sorted(set(ddp_kwargs) - known)
        if unknown:
            raise MisconfigurationException(
                f"TorchDDPStrategy({', '.join(f'{name}=...' for name in unknown)}): torch's DistributedDataParallel "
                f"has no such option; it has {', '.join(sorted(known))}."
            )
        self._ddp_kwargs = ddp_kwargs
        self._comm = (ddp_comm_state, ddp_comm_hook, ddp_comm_wrapper)
        self._averaging_period = model_averaging_period
        self.ddp: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []  # those that it averages
        self._blocked = False

    # -- a run

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self.world_size > 1:
            self.same_model_everywhere()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Where hooks only average within groups, the weights are averaged every so many steps."""
        if self._averaging_period is None or self.world_size == 1:
            return
        from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

        state = self._comm[0]
        if not isinstance(state, PostLocalSGDState):
            raise MisconfigurationException(
                f"TorchDDPStrategy(model_averaging_period={self._averaging_period}, ddp_comm_state="
                f"{type(state).__name__}): weights are averaged after steps with a PostLocalSGDState; pass one, and "
                f"ddp_comm_hook=post_localSGD_hook."
            )
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        averager: Any = PeriodicModelAverager(period=self._averaging_period, warmup_steps=state.start_localSGD_iter)
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(lambda done, *_: averager.average_parameters(done.param_groups))

    def refresh(self) -> None:
        """Wrap the module for the parameters that are trained now."""
        module = self.lightning_module
        assert module is not None
        if self.world_size == 1:
            return
        trained = [p for p in module.parameters() if p.requires_grad]
        if self.ddp is not None:
            had = self._trained
            if len(had) == len(trained) and all(a is b for a, b in zip(had, trained, strict=True)):
                return
        self._trained, self.ddp = trained, None
        if not trained:
            return
        device = self.root_device
        self.ddp = DistributedDataParallel(
            Step(module), device_ids=[device] if device.type == "cuda" else None, **self._ddp_kwargs
        )
        state, hook, wrapper = self._comm
        if self.flights is not None:
            vars(self.ddp)["_sync_buffers"] = self.flights.timed(self.ddp._sync_buffers, "buffers")
        if hook is not None:
            self.ddp.register_comm_hook(state, hook if wrapper is None else wrapper(hook))

    def bind_step(self, step: Callable[..., Any], reduces: bool) -> Callable[..., Any]:
        module = self.lightning_module
        assert module is not None
        if self.world_size == 1:
            return step
        # In manual optimization any number of backwards may follow: each is prepared for where it begins.
        automatic = module.automatic_optimization

        def through_ddp(*args: Any) -> Any:
            ddp = self.ddp
            if ddp is None:
                return step(*args)
            ddp.module.step = step
            ddp.require_backward_grad_sync = reduces and automatic
            output = ddp(*args)
            ddp.require_forward_param_sync |= not automatic  # buffers are sent before the next forward
            return output

        return through_ddp

    def bind_backward(self, backward: Backward, reduces: bool) -> Backward:
        assert self.lightning_module is not None
        if self.world_size == 1:
            return backward
        if self.flights is not None and reduces:
            backward = _with_timed_end(backward, self.flights.waiting("gradients"))
        if self.lightning_module.automatic_optimization:
            return backward

        def prepared(loss: Tensor) -> None:
            ddp = self.ddp
            if ddp is not None and not self._blocked:
                finds = ddp.find_unused_parameters and not ddp.static_graph
                ddp.reducer.prepare_for_backward([loss] if finds else [])
            backward(loss)

        return prepared

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        before, self._blocked = self._blocked, True
        try:
            yield
        finally:
            self._blocked = before

    def note_rows(self) -> Iterator[tuple[str, str, str]]:
        if self.world_size > 1:
            yield "backward", "torch", f"DistributedDataParallel averages over {self.world_size} processes"

    def teardown(self) -> None:
        self.ddp = None
        super().teardown()


def _with_timed_end(backward: Backward, waiting: AbstractContextManager[None]) -> Backward:
    """Where DistributedDataParallel waits for its buckets and copies them out is no backward.

    It does so in a callback at the end of autograd's run, which it asks for when its last bucket has been sent. One
    that was asked for at the beginning of that run is called just before.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback

    def until_the_end(loss: Tensor) -> None:
        if not loss.requires_grad:
            return backward(loss)  # which says so
        entered: list[None] = []

        def begin() -> None:
            entered.append(waiting.__enter__())

        handle = loss.register_hook(lambda grad: queue(begin))  # type: ignore[no-untyped-call]
        try:
            backward(loss)
        finally:
            handle.remove()
            if entered:
                waiting.__exit__(None, None, None)

    return until_the_end
