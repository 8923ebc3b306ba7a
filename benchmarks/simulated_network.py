"""A network that is only waited for: a process group in one process whose collectives take the time of a real link.

`SimulatedGroup` is a `torch.distributed.ProcessGroup`, so that torch's own DDP runs on it, and whatever else calls
`torch.distributed`. It pretends that `ranks` processes are joined by a `Network`. A collective is put on the link, one
at a time and in the order of the calls, as NCCL runs them on one communicator; a thread fulfils its future when a ring
or a tree of such processes would be done. Until then the processor is free, as a host is beside a GPU.

All ranks are taken to hold what this one holds: a sum is multiplied by the number of ranks, an average is left alone.

A `scale` beyond 1 divides every bandwidth: a model whose tensors are that much smaller then has the transfer times of
the whole one, and what a real GPU copies within microseconds costs this processor little, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

NAME = "simulated"
SPIN = 50e-6  # seconds before a deadline in which a thread stops sleeping: what a sleep of Linux may oversleep


@dataclass(frozen=True)
class Network:
    """A link and what NCCL's tuning model knows of it, which the times of collectives follow.

    A ring of W ranks takes 2 (W - 1) steps for an all-reduce and moves 2 (W - 1) / W bytes a byte; a tree takes
    2 log2(W) longer steps and moves two, at 0.9 of the bandwidth: NCCL takes whichever ends first. Reduce-scatter and
    all-gather are half a ring. Left out: protocols for small messages (LL, LL128), switches that add (NVLS, SHARP), and
    a faster network within a host. Each rank is a host of its own.

    Source: NVIDIA/nccl, src/graph/tuning.cc: latency = base + steps * step, time = latency + bytes / bandwidth.

    Args:
        bandwidth: bytes/s in one direction, NCCL's "bus bandwidth".
        base: s that any collective takes.
        step: s of a step of the ring; `tree_step` s of a step up or down the tree.
    """

    name: str
    bandwidth: float
    base: float
    step: float
    tree_step: float

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds until `nbytes` on each rank are summed on each."""
        ring = 2 * (ranks - 1) * (self.step + nbytes / ranks / self.bandwidth)
        tree = 2 * (math.ceil(math.log2(ranks)) * self.tree_step + nbytes / (0.9 * self.bandwidth))
        return self.base + min(ring, tree) if ranks > 1 else 0.0

    def half_ring(self, nbytes: float, ranks: int) -> float:
        """Seconds of a reduce-scatter, an all-gather or an all-to-all: `nbytes` is the whole, on all ranks."""
        return self.base + (ranks - 1) * (self.step + nbytes / ranks / self.bandwidth) if ranks > 1 else 0.0

    def pipeline(self, nbytes: float, ranks: int) -> float:
        """Seconds of a broadcast or a reduce, which pass through all ranks in a pipeline."""
        return self.base + (ranks - 1) * self.step + nbytes / self.bandwidth if ranks > 1 else 0.0


# Bandwidths are those of the lines, in one direction. Steps and base: NCCL's tuning.cc, "Simple", NVLink and network.
# Ethernet without RDMA: 30 us from process to process through the kernel's TCP, a usual half of a round trip.
NETWORKS = {
    network.name: network
    for network in (
        Network("NVLink", 450e9, 8.4e-6, 3.4e-6, 28e-6),  # H100, H200: 18 links of 25 GB/s
        Network("InfiniBand NDR", 50e9, 8.4e-6, 14e-6, 28e-6),  # 400 Gbit/s a GPU
        Network("InfiniBand HDR", 25e9, 8.4e-6, 14e-6, 28e-6),  # 200 Gbit/s
        Network("100 GbE", 12.5e9, 8.4e-6, 30e-6, 30e-6),
        Network("10 GbE", 1.25e9, 8.4e-6, 30e-6, 30e-6),
    )
}
UNCHANGED = [getattr(dist.ReduceOp, name) for name in ("AVG", "MAX", "MIN", "BAND", "BOR")]  # of equal values
INSTANT = Network("instant", math.inf, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Transfer:
    """One collective that is over; times by `time.perf_counter`. It should have been over at `due`."""

    kind: str
    nbytes: int
    issued: float
    start: float
    due: float
    end: float


def wait_until(deadline: float) -> None:
    """Sleeps, with a short spin at the end that lets other threads run."""
    left = deadline - time.perf_counter() - SPIN
    if left > 0:
        time.sleep(left)
    while time.perf_counter() < deadline:
        time.sleep(0)


def precise_sleeps() -> None:
    """Asks Linux to wake this thread when it is due, not up to 50 us later (PR_SET_TIMERSLACK, in ns)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(29, ctypes.c_ulong(1), 0, 0, 0)


def nbytes_of(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SimulatedGroup(dist.ProcessGroup):
    """Rank `rank` of `ranks` that are joined by `network`; see the module.

    `network` may be changed between collectives, so that two are compared in one run. `transfers` are those that are
    over, in order, until `transfers.clear()`.
    """

    def __init__(self, rank: int, ranks: int, network: Network = INSTANT, scale: float = 1.0) -> None:
        super().__init__(rank, ranks)
        self.network, self.scale = network, scale
        self.transfers: list[Transfer] = []
        self._rank, self._ranks = rank, ranks
        self._free = 0.0  # when the link has sent all that it was given
        self._error: Exception | None = None
        self._due: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="simulated network", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; raises what writing the values of a collective has raised, as the next collective does."""
        self._due.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def getBackendName(self) -> str:
        return NAME

    # ---- the link ----

    def _send(self, kind: str, nbytes: int, seconds: float, values: Callable[[], object], result: Any) -> dist.Work:
        """Puts a collective on the link; `values` writes what it results in, while it is under way."""
        if self._error is not None:
            raise self._error
        issued = time.perf_counter()
        start = max(issued, self._free)
        self._free = start + seconds
        future: Future[Any] = Future()
        self._due.put((kind, nbytes, issued, start, self._free, values, future, result))
        return _create_work_from_future(future)

    def _serve(self) -> None:
        precise_sleeps()
        while (job := self._due.get()) is not None:
            kind, nbytes, issued, start, due, values, future, result = job
            try:
                with torch.no_grad():
                    values()
            except Exception as error:  # a work made from a future does not pass exceptions on
                self._error = error
            wait_until(due)
            self.transfers.append(Transfer(kind, nbytes, issued, start, due, time.perf_counter()))
            future.set_result(result)

    def _all_reduced(self, tensors: Sequence[torch.Tensor], opts: Any) -> dist.Work:
        nbytes = nbytes_of(tensors)
        seconds = self.network.all_reduce(nbytes * self.scale, self._ranks)
        op = opts.reduceOp
        return self._send("all_reduce", nbytes, seconds, lambda: self._reduce(tensors, op), list(tensors))

    def _reduce(self, tensors: Sequence[torch.Tensor], op: Any) -> None:
        for tensor in tensors:
            if op == dist.ReduceOp.SUM:
                tensor.mul_(self._ranks)
            elif op == dist.ReduceOp.PRODUCT:
                tensor.pow_(self._ranks)
            elif not any(op == other for other in UNCHANGED):  # `in` would ask the other way round, which fails
                raise NotImplementedError(f"The simulated network cannot reduce by {op}.")

    def _halved(self, kind: str, nbytes: int, values: Callable[[], object], result: Any) -> dist.Work:
        return self._send(kind, nbytes, self.network.half_ring(nbytes * self.scale, self._ranks), values, result)

    def _passed(self, kind: str, nbytes: int, values: Callable[[], object], result: Any) -> dist.Work:
        return self._send(kind, nbytes, self.network.pipeline(nbytes * self.scale, self._ranks), values, result)

    # ---- what torch.distributed calls; lists of tensors are those of one device each, always one ----

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self._all_reduced(tensors, opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self._all_reduced(tensors, opts or dist.AllreduceCoalescedOptions())

    def broadcast(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self._passed("broadcast", nbytes_of(tensors), lambda: None, list(tensors))

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        root, op = [] if opts.rootRank != self._rank else tensors, opts.reduceOp
        return self._passed("reduce", nbytes_of(tensors), lambda: self._reduce(root, op), list(tensors))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        def values() -> None:
            for output, given in zip(outputs, inputs, strict=True):
                for part in output:
                    part.copy_(given)

        return self._halved("all_gather", self._ranks * nbytes_of(inputs), values, outputs)

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> dist.Work:
        def values() -> None:
            output.view(self._ranks, -1).copy_(given.reshape(1, -1))

        return self._halved("all_gather", nbytes_of([output]), values, [output])

    _allgather_base = all_gather_single  # torch until 2.12

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        def values() -> None:
            for output, given in zip(outputs, inputs, strict=True):
                output.view(self._ranks, -1).copy_(given.reshape(1, -1))

        return self._halved("all_gather", nbytes_of(outputs), values, list(outputs))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        def values() -> None:
            for output, parts in zip(outputs, inputs, strict=True):
                output.copy_(parts[self._rank])
            self._reduce(outputs, (opts or dist.ReduceScatterOptions()).reduceOp)

        return self._halved("reduce_scatter", sum(nbytes_of(parts) for parts in inputs), values, list(outputs))

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> dist.Work:
        def values() -> None:
            output.view(-1).copy_(given.reshape(self._ranks, -1)[self._rank])
            self._reduce([output], (opts or dist.ReduceScatterOptions()).reduceOp)

        return self._halved("reduce_scatter", nbytes_of([given]), values, [output])

    _reduce_scatter_base = reduce_scatter_single  # torch until 2.12

    def all_to_all_single(
        self, output: torch.Tensor, given: torch.Tensor, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> dist.Work:
        def values() -> None:
            parts = given.split(list(input_splits)) if input_splits else given.chunk(self._ranks)
            output.copy_(parts[self._rank].repeat(self._ranks, *[1] * (given.dim() - 1)))

        return self._halved("all_to_all", nbytes_of([given]), values, [output])

    alltoall_base = all_to_all_single  # torch until 2.12

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._send("barrier", 0, self.network.all_reduce(0, self._ranks), lambda: None, [])


def _create(store: dist.Store, rank: int, ranks: int, timeout: Any) -> SimulatedGroup:
    return SimulatedGroup(rank, ranks)


dist.Backend.register_backend(NAME, _create, devices=["cpu"])


@contextlib.contextmanager
def joined(ranks: int, network: Network, scale: float = 1.0) -> Iterator[SimulatedGroup]:
    """The default process group of torch.distributed, in this process alone, as rank 0 of `ranks`."""
    dist.init_process_group(NAME, store=dist.HashStore(), rank=0, world_size=ranks)
    group = dist.group.WORLD
    assert isinstance(group, SimulatedGroup)
    group.network, group.scale = network, scale
    try:
        yield group
    finally:
        dist.destroy_process_group()
        group.close()
