"""Ranks that sum tensors without end; one of them fails in the way that the command line names.

Arguments: rank that fails, how, and seconds of silence that are one too many. Its place is in the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from lit_fast.strategies.process_group import join

victim, how, timeout = sys.argv[1:]
rank = os.environ["RANK"]


def fail() -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "raise":
        raise ValueError("one rank only")
    elif how == "exit":
        sys.exit(0)
    elif how == "end":
        os._exit(0)


joined = join(
    rank=int(rank), world_size=int(os.environ["WORLD_SIZE"]), main_address=os.environ["MASTER_ADDR"],
    main_port=int(os.environ["MASTER_PORT"]), arrival_seconds=30.0, watchdog_timeout=float(timeout),
)  # fmt: skip
watchdog = joined.watchdog
try:
    numbers = torch.ones(200_000)
    for step in range(10**9):
        dist.all_reduce(numbers)
        numbers.fill_(1.0)
        if step == 20:
            print("running", flush=True)
            if rank == victim:
                fail()
        time.sleep(0.01)
except BaseException as error:
    watchdog.report(error, "while training")
    named = watchdog.explain_failure(error)
    raise named from named.__cause__
finally:
    joined.leave()
