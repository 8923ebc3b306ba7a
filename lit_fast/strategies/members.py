"""Who is in a job: what each process says of itself, and what another one of its machine can see of it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Member:
    """One process of a job, as it says of itself.

    Args:
        rank, world_size: its number, and how many processes it was told there are.
        host, pid: where it runs, for people.
        machine, began: which kernel and table of processes its pid is of, and when it was started (clock ticks since
            that kernel's start), so that others of the same machine know it from a later one of the same pid.
        says: what must be equal on all, by name: versions, backend.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    machine: str
    began: str
    says: Mapping[str, str]

    @classmethod
    def here(cls, rank: int, world_size: int, says: Mapping[str, str] | None = None) -> Member:
        """This process."""
        pid = os.getpid()
        stat = _stat(pid)
        began = stat[19] if stat else ""
        return cls(rank, world_size, socket.gethostname(), pid, _machine(), began, dict(says or {}))

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Member:
        return cls(**json.loads(text))

    def seen_from_here(self) -> bool:
        """Whether its pid means something to this process."""
        return self.machine != "" and self.machine == _machine()

    def fate(self) -> str | None:
        """How it ended, as this machine shows it; None where it lives, or cannot be seen from here."""
        if not self.seen_from_here():
            return None
        stat = _stat(self.pid)
        if not stat or stat[19] != self.began:
            return "has ended without a word: killed, perhaps, or out of memory"
        return ending(os.waitstatus_to_exitcode(int(stat[49]))) if stat[0] in "ZX" else None

    def stopped(self) -> bool:
        """Whether a signal (SIGSTOP, Ctrl-Z) or a debugger holds it, as this machine shows it."""
        stat = _stat(self.pid) if self.seen_from_here() else []
        return bool(stat) and stat[0] in "Tt"


def ending(exit_code: int) -> str:
    """An exit code in words; minus the number of the signal that ended a process, as `subprocess` has it.

    >>> ending(-15), ending(3)
    ('was killed by SIGTERM', 'ended with exit code 3')
    """
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-exit_code}"
    return f"was killed by {name}{' (out of memory, perhaps)' if -exit_code == signal.SIGKILL else ''}"


def ranks(numbers: Iterable[int]) -> str:
    """Ranks in words; runs of them shortened.

    >>> ranks([3]), ranks([5, 0, 1, 2])
    ('rank 3', 'ranks 0 to 2, 5')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' * (sum(map(len, runs)) > 1)} {', '.join(parts)}"


def listener(port: int) -> str | None:
    """Which process of this machine listens on a TCP port, in words, as far as this user may see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            return None
        for row in map(str.split, rows):
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:  # 0A: it listens
                inodes.add(f"socket:[{row[9]}]")
    for process in PROC.glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {process.name} ({command[:120]})"
        except OSError:  # it has ended, or is another user's
            continue
    return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (proc(5): state, ..., start time 22nd, exit code 52nd)."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _machine() -> str:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip() + os.readlink(PROC / "self/ns/pid")
    except OSError:  # no Linux
        return ""
