"""Functions that do their work in the first process only."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("lit_fast")


def rank() -> int:
    """The rank of this process in the whole job, as its launcher says; 0 where none was set."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def rank_zero_only(function: Callable[P, R]) -> Callable[P, R | None]:
    """Returns a function that calls `function` where the rank is 0 and returns None elsewhere.

    >>> rank_zero_only(lambda: "said")()
    'said'
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if rank() == 0 else None

    return wrapped


@rank_zero_only
def rank_zero_debug(*args: Any, **kwargs: Any) -> None:
    """Logs at level DEBUG on the logger `lit_fast`, in the first process."""
    log.debug(*args, **kwargs)


@rank_zero_only
def rank_zero_info(*args: Any, **kwargs: Any) -> None:
    """Logs at level INFO on the logger `lit_fast`, in the first process."""
    log.info(*args, **kwargs)


@rank_zero_only
def rank_zero_warn(message: str | Warning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warns in the first process; the default `stacklevel` names the caller of the function that warns."""
    warnings.warn(message, stacklevel=stacklevel, **kwargs)
