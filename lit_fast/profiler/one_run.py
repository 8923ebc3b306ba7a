"""Which files of a folder are of one run: an earlier one, of more processes, leaves some that nobody writes over.

Processes of a run have its name in common (`Header.run`: where they meet, and the job they are of), their number and
their program, and they run at the same time: what had ended when the last of them began is of an earlier run, whatever
its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lit_fast.profiler.record import Profile

if TYPE_CHECKING:
    from lit_fast.strategies.strategy import Strategy

# s by which the beginning of one process may lie after the end of another all the same: times are whole seconds, and
# clocks of several hosts differ.
SLACK, SLACK_OF_HOSTS = 2.0, 60.0
JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


def name_of(strategy: Strategy) -> str | None:
    """The same in all processes of a run, and in no other run of theirs; None where one process is all of it."""
    if strategy.world_size == 1:
        return None
    environment = getattr(strategy, "cluster_environment", None)
    meets = [] if environment is None else [f"{environment.main_address}:{environment.main_port}"]
    return " ".join([*meets, *(f"{name}={os.environ[name]}" for name in JOB if name in os.environ)]) or None


@dataclass(frozen=True)
class Stamp:
    """What tells the run that a file is of."""

    rank: int
    world_size: int
    run: str | None
    program: str
    host: str
    began: float  # s since 1970
    ended: float  # until when it has recorded

    @classmethod
    def of(cls, profile: Profile) -> Stamp:
        head = profile.header
        try:
            began = datetime.fromisoformat(head.started).timestamp()
        except ValueError:  # nobody noted it
            began = 0.0
        program = Path(head.script).name
        return cls(head.rank, head.world_size, head.run, program, head.host, began, began + profile.wall)

    def is_with(self, last: Stamp) -> bool:
        """Whether it is of the run of which `last` is the process that began last."""
        alike = (self.world_size, self.run, self.program) == (last.world_size, last.run, last.program)
        return alike and self.ended + (SLACK if self.host == last.host else SLACK_OF_HOSTS) >= last.began

    def __str__(self) -> str:
        begun = datetime.fromtimestamp(self.began).astimezone().isoformat(" ", "seconds") if self.began else "once"
        return f"{self.program or 'a program'} in {self.world_size} processes, begun {begun}"


def newest(stamps: Mapping[Path, Stamp]) -> tuple[list[Path], list[Path]]:
    """The files of the run that began last, and those of others."""
    last = max(stamps.values(), key=lambda stamp: (stamp.began, stamp.world_size))
    kept = [path for path, stamp in stamps.items() if stamp.is_with(last)]
    return kept, [path for path in stamps if path not in set(kept)]
