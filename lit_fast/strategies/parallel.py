"""Several processes, one device each: who they are, and what they say to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lit_fast.checkpoint.plugins import CheckpointIO
from lit_fast.distributed.flights import PHASE, Flights
from lit_fast.errors import CheckpointError, MisconfigurationException
from lit_fast.rank_zero import set_rank
from lit_fast.strategies.control import Control
from lit_fast.strategies.environments import ClusterEnvironment, detect_environment
from lit_fast.strategies.launchers import Launcher, MultiProcessingLauncher, SubprocessScriptLauncher
from lit_fast.strategies.process_group import Joined, join
from lit_fast.strategies.same_model import check_one_device, check_same_model
from lit_fast.strategies.strategy import Strategy
from lit_fast.strategies.watchdog import TIMEOUT as WATCHDOG_TIMEOUT

TIMEOUT = timedelta(minutes=30)  # of a collective, torch's own default
BROADCAST_BYTES = 250 << 20  # of one message that makes models or buffers equal
broadcast_coalesced = dist._broadcast_coalesced  # type: ignore[attr-defined]  # as torch's own DDP calls it
COLLECTIVES = ("barrier", "broadcast", "reduce", "all_gather", "gather_objects", "reduce_boolean_decision")
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class ParallelStrategy(Strategy):
    """What all strategies of several processes share: the process group, ranks, collectives.

    Args:
        accelerator, checkpoint_io, precision_plugin: as of `Strategy`.
        parallel_devices: this machine's devices, one a process; the Trainer sets them.
        cluster_environment: how a process learns its rank; found in the environment where None.
        process_group_backend: of torch.distributed; "nccl" on GPUs and "gloo" on CPUs where None.
        timeout: how long a collective, or a process that joins, is waited for.
        start_method: how the other processes of this machine are started, where nothing else starts them.
    """

    is_distributed = True
    phases: ClassVar[dict[str, str]] = {**Strategy.phases, **dict.fromkeys(COLLECTIVES, PHASE)}
    # Seconds without a sign of life after which a process is given up, None: never. Set it before a run.
    watchdog_timeout: float | None = WATCHDOG_TIMEOUT

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
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self.parallel_devices = list(parallel_devices or [])
        self.cluster_environment = cluster_environment
        self.process_group_backend = process_group_backend
        self.timeout = TIMEOUT if timeout is None else timeout
        self.num_nodes = 1
        self.start_method = start_method
        self.joined: Joined | None = None  # this process among the others, during a run
        self._launcher: Launcher | None = None
        self._launched = False  # whether this is one of the processes that the launcher has started

    # -- places

    def place(self, devices: list[torch.device], num_nodes: int) -> None:
        """Take these devices of this machine, of `num_nodes` machines that have as many; numbers the processes."""
        self.parallel_devices, self.num_nodes = list(devices), num_nodes
        if self.cluster_environment is None:
            self.cluster_environment = detect_environment()
        self.cluster_environment.validate_settings(self.num_processes, num_nodes)
        self._number()
        if self.world_size > 1 and not self.cluster_environment.creates_processes_externally:
            self._launcher = self._make_launcher(self.cluster_environment)

    def _make_launcher(self, cluster: ClusterEnvironment) -> Launcher:
        if self.start_method == "popen":
            return SubprocessScriptLauncher(cluster, self.num_processes, self.num_nodes)
        return MultiProcessingLauncher(self, self.start_method)

    def _number(self) -> None:
        """This process's numbers, as the cluster, or the launcher that made this process, says."""
        cluster = self.cluster_environment
        assert cluster is not None, "the strategy has no devices yet"
        self.local_rank, self.node_rank = cluster.local_rank(), cluster.node_rank()
        cluster.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        cluster.set_world_size(self.num_nodes * self.num_processes)
        self.global_rank, self.world_size = cluster.global_rank(), cluster.world_size()
        set_rank(self.global_rank)

    @property
    def num_processes(self) -> int:  # type: ignore[override]
        """On this machine."""
        return len(self.parallel_devices)

    @property
    def root_device(self) -> torch.device:  # type: ignore[override]
        """This process's."""
        return self.parallel_devices[self.local_rank]

    @property
    def is_global_zero(self) -> bool:  # type: ignore[override]
        return self.global_rank == 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:  # type: ignore[override]
        return {"num_replicas": self.world_size, "rank": self.global_rank} if self.world_size > 1 else None

    # -- the group

    @property
    def launcher(self) -> Any:
        """What starts this machine's other processes; None inside them, and where something else started them."""
        return None if self._launched else self._launcher

    @contextmanager
    def launched(self) -> Iterator[None]:
        before, self._launched = self._launched, True
        self._number()
        try:
            yield
        finally:
            self._launched = before

    @property
    def backend(self) -> str:
        return self.process_group_backend or ("nccl" if self.root_device.type == "cuda" else "gloo")

    def setup_environment(self) -> None:
        if self.root_device.type == "cuda":
            torch.cuda.set_device(self.root_device)
        self.control = Control() if self.world_size > 1 else None
        if self.world_size > 1 and self.joined is None:
            cluster = self.cluster_environment
            assert cluster is not None
            self.joined = join(
                rank=self.global_rank,
                world_size=self.world_size,
                main_address=cluster.main_address,
                main_port=cluster.main_port,
                backend=self.backend,
                timeout=self.timeout,
                device=self.root_device if self.root_device.type == "cuda" else None,
                watchdog_timeout=self.watchdog_timeout,
            )

    def watch(self, timed: Callable[..., Callable[..., Any]], flights: Flights) -> None:
        super().watch(timed, flights)
        if self.control is not None:
            self.control.watch(flights)

    def teardown(self) -> None:
        """All processes come to the end of the run together, unless one failed; their group stays."""
        super().teardown()
        joined, self.joined = self.joined, None
        if joined is not None:
            joined.leave()

    def explain_failure(self, error: BaseException, phase: str) -> BaseException:
        """As of `Strategy`: a RankFailedError where another process is the cause; of others those hear."""
        if self.joined is None:
            return error
        self.joined.watchdog.report(error, phase)
        return self.joined.watchdog.explain_failure(error)

    @property
    def group(self) -> Any:
        """All processes."""
        return dist.group.WORLD

    def same_model_everywhere(self) -> None:
        """Parameters and buffers become those of the first process.

        Raises:
            ProcessGroupError: the models differ in more than values.
        """
        assert self.lightning_module is not None, "no model is connected"
        check_one_device(self.lightning_module)
        check_same_model(self.lightning_module, self.group)
        state = [t.detach() for t in chain(self.lightning_module.parameters(), self.lightning_module.buffers())]
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in state:
            by_device.setdefault(tensor.device, []).append(tensor)
        for tensors in by_device.values():
            broadcast_coalesced(self.group, tensors, BROADCAST_BYTES, 0)

    # -- backward

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """As a plugin, or manual optimization, sees it: a plugin's in `bind_backward`, the other one reduces itself."""
        if optimizer is not None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)

        def through_plugin(loss: Tensor) -> None:
            super(ParallelStrategy, self).backward(loss, None, *args, **kwargs)

        self.bind_backward(through_plugin, reduces=True)(closure_loss)
        return closure_loss

    # -- collectives

    def barrier(self, name: str | None = None) -> None:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # over the CPU's group: a GPU need not be waited for

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.world_size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src, device=torch.device("cpu"))
        return objects[0]

    def of_first(self, function: Callable[[], Any]) -> Any:
        result: Any = None
        error: Exception | None = None
        if self.is_global_zero:
            try:
                result = function()
            except Exception as raised:
                error = raised
        result, told = self.broadcast((result, error))
        if told is not None:
            raise error or told
        return result

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self.world_size == 1 or not isinstance(tensor, Tensor):
            return tensor
        operation = reduce_op
        if isinstance(reduce_op, str):
            operation = _OPERATIONS.get({"mean": "sum", "avg": "sum"}.get(reduce_op.lower(), reduce_op.lower()))
            if operation is None:
                raise MisconfigurationException(
                    f"reduce_op={reduce_op!r}: allowed are 'mean', 'sum', 'min' and 'max', or a torch.distributed."
                    f"ReduceOp."
                )
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        reduced = tensor.detach().clone()
        if mean and not reduced.is_floating_point():
            reduced = reduced.to(torch.get_default_dtype())
        dist.all_reduce(reduced, operation, group=group)
        return reduced.div_(dist.get_world_size(group)) if mean else reduced

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self.world_size == 1:
            return tensor
        if sync_grads and tensor.requires_grad:
            from torch.distributed.nn.functional import all_gather

            given = (tensor,) if group is None else (tensor, group)
            return torch.stack(all_gather(*given))  # type: ignore[no-untyped-call]
        own = tensor.detach().contiguous()
        shards = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, own, group=group)
        return torch.stack(shards)

    def gather_objects(self, obj: Any) -> list[Any]:
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(obj, gathered, dst=0)
        return gathered or []

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.world_size == 1:
            return decision
        votes = torch.tensor(int(decision), dtype=torch.int32)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else int(votes) > 0

    # -- checkpoints: one process writes

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Written by the first process; the others wait, and raise the error that it meets."""
        failure: CheckpointError | None = None
        if self.is_global_zero:
            try:
                super().save_checkpoint(checkpoint, filepath, storage_options)
            except CheckpointError as error:
                failure = error
        told = self.broadcast(None if failure is None else str(failure))
        if told is not None:
            raise CheckpointError(told) from failure

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            super().remove_checkpoint(filepath)
