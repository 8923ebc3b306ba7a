"""How the processes of a job come together, or every one of them learns why they do not."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from lit_fast import __version__
from lit_fast.errors import ProcessGroupError
from lit_fast.strategies.members import Member, listener, ranks
from lit_fast.strategies.watchdog import TIMEOUT, Watchdog

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # torch's own default for Gloo
ARRIVAL_SECONDS = 300.0  # for the slowest machine to start its processes and import torch
TELLING_SECONDS = 5.0  # for the others to read why it failed, before the store goes with its host
TOGETHER = "together"

# Of each process by its pid: one that was forked has its parent's variables, not its parent's place in a job.
_opened: dict[int, tuple[Store, bool]] = {}  # the store, and whether this process hosts it
_connections: dict[int, set[tuple[int, str]]] = {}  # of the group
_rounds: Counter[int] = Counter()  # how often it has joined


@dataclass(frozen=True)
class Joined:
    """A process among the others of its job.

    Args:
        rank, world_size: its number among how many.
        members: all of them, by rank.
        store: what they tell each other outside collectives; keys are of this run alone.
        hosts_store: whether the store ends with this process.
        watchdog: names a rank that dies, raises or hangs; it runs until `leave`.
    """

    rank: int
    world_size: int
    members: tuple[Member, ...]
    store: Store
    hosts_store: bool
    watchdog: Watchdog

    def leave(self) -> None:
        """The end of a run: wait until all ranks have come to theirs, unless one failed. The group stays."""
        self.watchdog.leave()


def join(
    *,
    rank: int,
    world_size: int,
    main_address: str,
    main_port: int,
    backend: str = "gloo",
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    arrival_seconds: float = ARRIVAL_SECONDS,
    device: torch.device | None = None,
    watchdog_timeout: float | None = TIMEOUT,
) -> Joined:
    """Bring up `torch.distributed`'s process group, or say on every rank why it does not come up.

    Rank 0 hosts the store through which the ranks find each other, unless torchrun does. Before the group is made the
    ranks compare their numbers, versions and backends there. A group that exists stays in use, also one that the
    program has made itself.

    Args:
        rank, world_size: this process's number among how many, from 0.
        main_address, main_port: where rank 0's store listens.
        backend: as of `torch.distributed.init_process_group`. "nccl" means "cpu:gloo,cuda:nccl", so that objects and
            control need no GPU.
        timeout: of each collective.
        arrival_seconds: how long the slowest rank is waited for.
        device: this rank's, where it is a GPU.
        watchdog_timeout: seconds of silence after which a rank is given up; see `Watchdog`.

    Raises:
        ProcessGroupError: the port is in use, the address leads nowhere, a rank does not come or does not fit, or
            versions differ. All ranks that can be reached raise the same.

    Example:
        >>> from socket import create_server
        >>> with create_server(("127.0.0.1", 0)) as free:
        ...     port = free.getsockname()[1]
        >>> joined = join(rank=0, world_size=1, main_address="127.0.0.1", main_port=port)
        >>> joined.members[0].rank, dist.get_backend()
        (0, 'gloo')
        >>> joined.leave()
        >>> disband()
    """
    if dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ProcessGroupError(
            f"torch.distributed has a process group already, in which this process is rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; the Trainer's devices= and num_nodes= make it rank {rank} of {world_size}. Give "
            f"the Trainer the numbers of that group, or leave it before the Trainer starts."
        )
    deadline = time.monotonic() + arrival_seconds
    backend = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    store, hosts = _open_store(rank, main_address, main_port, deadline)
    _rounds[os.getpid()] += 1
    # torchrun's store may serve several attempts; a process that joins again finds no keys of the time before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"lit_fast/{attempt}/{_rounds[os.getpid()]}", store)
    says = {"torch": _release(torch.__version__), "lit_fast": __version__, "backend": backend}
    here = Member.here(rank, world_size, says)
    members = _within(
        deadline + 2 * TELLING_SECONDS,
        lambda: meet(store, here, deadline - time.monotonic(), hosts=hosts),
        f"The store at {main_address}:{main_port} stopped answering while the ranks met: the process that hosts it "
        f"hangs, or the network to it is cut.",
    )
    watchdog = Watchdog(store, rank, members, timeout=watchdog_timeout, hosts_store=hosts, cut=cut_connections)
    watchdog.start()
    if not dist.is_initialized():
        try:
            _connect(store, here, members, backend, timeout, device, main_address)
        except ProcessGroupError as error:
            watchdog.report(error, "while connecting")
            raise
    return Joined(rank, world_size, members, store, hosts, watchdog)


def disband() -> None:
    """Destroy the process group, if there is one, and the store that this process hosts."""
    _opened.pop(os.getpid(), None)
    if dist.is_initialized():
        dist.destroy_process_group()


# -- the store


def _open_store(rank: int, address: str, port: int, deadline: float) -> tuple[Store, bool]:
    """The store of all ranks, and whether it is this process that hosts it."""
    if os.getpid() in _opened:
        return _opened[os.getpid()]
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store(), rank == 0
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    where = f"{address}:{port}"
    if not 0 < port < 2**16:
        raise ProcessGroupError(f"The main port is {port}; a TCP port is 1 to 65535. Change MASTER_PORT.")
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ProcessGroupError(
            f"The main address {address!r} is no host that this machine ({socket.gethostname()}) knows: {error}. Set "
            f"MASTER_ADDR to a name or an IP address of rank 0's machine, one that all machines reach."
        ) from error
    if not hosts:
        _wait_for_listener(address, port, deadline)
    options: dict[str, Any] = dict(wait_for_workers=False, timeout=timedelta(seconds=deadline - time.monotonic()))
    try:
        store = _within(
            deadline,
            lambda: TCPStore(address, port, is_master=hosts, **options),
            f"What listens at {where} does not answer as the store of this job. Another program may have taken the "
            f"port (set MASTER_PORT to a free one, on all machines alike), or rank 0 hangs.",
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            other = listener(port)
            raise ProcessGroupError(
                f"Port {port} is in use on {socket.gethostname()}{f', by {other}' if other else ''}, so that rank 0 "
                f"cannot listen there. End that program, or set MASTER_PORT to a free port, on all machines alike."
            ) from error
        raise ProcessGroupError(f"No store at {where}: {_first_line(error)}") from error
    _opened[os.getpid()] = (store, hosts)
    return store, hosts


def _wait_for_listener(address: str, port: int, deadline: float) -> None:
    """Until rank 0 listens: here, because torch's own waiting warns at each attempt."""
    pause = 0.01
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise ProcessGroupError(
                    f"Nothing answers at {address}:{port} ({error}), where rank 0 should listen. Either rank 0 did not "
                    f"start or failed before (its own output says why), or MASTER_ADDR and MASTER_PORT are not those "
                    f"of its machine, or a firewall is between."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


# -- meeting


def meet(store: Store, here: Member, seconds: float, *, hosts: bool) -> tuple[Member, ...]:
    """All members, by rank, once they are there and agree.

    Each appends itself to one list; the first that sees all, or sees what cannot be, posts the verdict that everyone
    waits for. So it takes four requests a rank, and nobody has to be there for the others to learn what is wrong.

    Raises:
        ProcessGroupError: the verdict, the same on all ranks.
    """
    store.append("arrivals", here.to_json() + "\n")  # type: ignore[attr-defined]  # missing in torch's stubs
    arrivals = _arrivals(store)
    if problem := disagreement(arrivals):
        store.compare_set("verdict", "", problem)
    elif len(arrivals) == here.world_size:
        store.compare_set("verdict", "", TOGETHER)
    try:
        store.wait(["verdict"], timedelta(seconds=max(seconds, 0.001)))
    except RuntimeError as error:  # DistStoreError, or a plain one of stores that are no TCPStore
        if isinstance(error, dist.DistNetworkError):
            raise ProcessGroupError(f"The process that hosts the store has gone: {_first_line(error)}") from error
        store.compare_set("verdict", "", _missing(_arrivals(store), seconds))
    verdict = store.get("verdict").decode()
    arrivals = _arrivals(store)
    if verdict == TOGETHER:
        members = sorted(arrivals[: arrivals[0].world_size], key=lambda member: member.rank)
        if here in members:
            return tuple(members)
        verdict = disagreement(arrivals) or f"{here} came too late."
        raise ProcessGroupError(f"{verdict} The job runs without {here}.")
    told = store.add("told", 1)
    end = time.monotonic() + TELLING_SECONDS
    while hosts and told < len(arrivals) and time.monotonic() < end:
        time.sleep(0.02)
        told = store.add("told", 0)
    raise ProcessGroupError(verdict)


def disagreement(arrivals: Iterable[Member]) -> str | None:
    """What keeps these processes from being one job; None where nothing does."""
    arrivals = list(arrivals)
    by_size = _grouped(arrivals, lambda member: str(member.world_size))
    if len(by_size) > 1:
        return (
            f"The processes were told different world sizes: {_each(by_size)}. All need the same devices= and "
            f"num_nodes=, or WORLD_SIZE."
        )
    for member in arrivals:
        if not 0 <= member.rank < member.world_size:
            return (
                f"{str(member).capitalize()} does not fit in a world of {member.world_size}: ranks go from 0 to "
                f"{member.world_size - 1}. Compare devices= and num_nodes= with how many processes were started, and "
                f"RANK, LOCAL_RANK and NODE_RANK of each."
            )
    for rank, same in _grouped(arrivals, lambda member: str(member.rank)).items():
        if len(same) > 1:
            places = " and ".join(f"host {member.host}, pid {member.pid}" for member in same)
            return (
                f"Rank {rank} came {len(same)} times: {places}. Each process needs a rank of its own: check that "
                f"NODE_RANK differs between machines and LOCAL_RANK between the processes of one, and that no process "
                f"of an earlier run is left."
            )
    for name in arrivals[0].says:
        groups = _grouped(arrivals, lambda member: member.says.get(name, "none"))  # noqa: B023  (called at once)
        if len(groups) > 1:
            what = "backends" if name == "backend" else f"versions of {name}"
            return f"The ranks have different {what}: {_each(groups)}. Make them the same on all machines."
    return None


def _missing(arrivals: list[Member], seconds: float) -> str:
    world_size = arrivals[0].world_size
    missing = set(range(world_size)) - {member.rank for member in arrivals}
    there = "; ".join(map(str, sorted(arrivals, key=lambda member: member.rank)[:16]))
    more = f" and {len(arrivals) - 16} more" if len(arrivals) > 16 else ""
    return (
        f"Of {world_size} processes {len(missing)} did not come within {seconds:.0f} s: {ranks(missing)}. There are "
        f"{there}{more}. Look at the output of those that are missing, and whether devices= and num_nodes= are as many "
        f"as were started."
    )


def _arrivals(store: Store) -> list[Member]:
    return [Member.from_json(line) for line in store.get("arrivals").splitlines()]


def _grouped(members: Iterable[Member], value: Callable[[Member], str]) -> Mapping[str, list[Member]]:
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(value(member), []).append(member)
    return groups


def _each(groups: Mapping[str, list[Member]]) -> str:
    def who(members: list[Member]) -> str:
        return str(members[0]) if len(members) == 1 else ranks({member.rank for member in members})

    return ", ".join(f"{value} ({who(members)})" for value, members in sorted(groups.items()))


# -- the group


def _connect(
    store: Store,
    here: Member,
    members: tuple[Member, ...],
    backend: str,
    timeout: timedelta,
    device: torch.device | None,
    main_address: str,
) -> None:
    interface = None
    if len({member.host for member in members}) > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Gloo takes the address that the host's name resolves to, on many machines 127.0.1.1.
        interface = interface_towards(main_address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    before = _sockets()
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=here.rank,
            world_size=here.world_size,
            timeout=timeout,
            device_id=device if device is not None and device.type == "cuda" else None,
        )
    except Exception as error:
        raise ProcessGroupError(
            f"All {here.world_size} processes are there, but {backend} cannot connect {here} with the others: "
            f"{_first_line(error)} Where the machine has several networks, set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) "
            f"to the interface that reaches the other machines."
        ) from error
    _connections[os.getpid()] = _sockets() - before
    atexit.register(_at_exit, os.getpid())


def cut_connections() -> None:
    """Break the group's connections, so that collectives that wait for another rank fail in every thread.

    Gloo has nothing for that. Its sockets are those that came while the group was made.
    """
    if "nccl" in str(dist.get_backend_config()):
        dist.distributed_c10d._abort_process_group()  # private, and the only way
    for descriptor, _ in _connections.get(os.getpid(), set()) & _sockets():
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.getpeername()  # raises for one that listens, which Gloo must not lose
            connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> set[tuple[int, str]]:
    """Sockets of this process: descriptor, and what tells a later one of the same descriptor from it."""
    found = set()
    with suppress(OSError):  # no Linux
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor of this very listing
                identity = os.readlink(f"/proc/self/fd/{name}")
                if identity.startswith("socket:"):
                    found.add((int(name), identity))
    return found


def _at_exit(pid: int) -> None:
    if pid == os.getpid():  # not in forked processes
        with suppress(Exception):  # the interpreter ends; whatever failed was said before
            disband()


def interface_towards(address: str) -> str | None:
    """The name of the network interface that this machine reaches `address` through; None where it cannot be told."""
    import fcntl
    import struct

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an IPv4 address
                    request = struct.pack("256s", name.encode()[:15])
                    reply = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                    if socket.inet_ntoa(reply[20:24]) == own:
                        return name
    except OSError:
        return None
    return None


# -- small things


def _within(deadline: float, function: Callable[[], T], otherwise: str) -> T:
    """What `function` returns, if it does before the deadline: torch's store waits for ever where its host hangs."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    if not results:
        raise ProcessGroupError(otherwise)
    return results[0]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _release(version: str) -> str:
    """Without what says how it was built.

    >>> _release("2.13.0+cpu")
    '2.13.0'
    """
    return version.partition("+")[0]
