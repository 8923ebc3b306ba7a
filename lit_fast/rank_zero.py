"""Functions that do their work in the first process only."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from lit_fast.errors import LightningDeprecationWarning

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("lit_fast")


def rank() -> int:
    """The rank of this process in the whole job: as a strategy has found it, else as its launcher says; else 0."""
    if hasattr(rank_zero_only, "assigned"):
        return int(rank_zero_only.assigned)
    for name in ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """The message with the rank that says it, where there is one.

    >>> rank_prefixed_message("saved", 1), rank_prefixed_message("saved", None)
    ('[rank: 1] saved', 'saved')
    """
    return message if rank is None else f"[rank: {rank}] {message}"


def rank_zero_only(function: Callable[P, R]) -> Callable[P, R | None]:
    """Returns a function that calls `function` where the rank is 0 and returns None elsewhere.

    >>> rank_zero_only(lambda: "said")()
    'said'
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if rank() == 0 else None

    return wrapped


def set_rank(rank: int) -> None:
    """From here on this process has that rank."""
    rank_zero_only.assigned = rank_zero_only.rank = rank  # type: ignore[attr-defined]


rank_zero_only.rank = rank()  # type: ignore[attr-defined]  # programs read it: of this process as it began


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


@rank_zero_only
def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warns of something old, in the first process."""
    kwargs.setdefault("category", LightningDeprecationWarning)
    warnings.warn(message, stacklevel=stacklevel, **kwargs)


class WarningCache(set[str]):
    """Says each message once.

    >>> cache = WarningCache()
    >>> cache.info("said once"); cache.info("said once"); sorted(cache)
    ['said once']
    """

    def warn(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """Warn, unless this message was said before."""
        if message not in self:
            self.add(message)
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)

    def deprecation(self, message: str, stacklevel: int = 6, **kwargs: Any) -> None:
        """Warn of something old, unless this message was said before."""
        if message not in self:
            self.add(message)
            rank_zero_deprecation(message, stacklevel=stacklevel, **kwargs)

    def info(self, message: str, **kwargs: Any) -> None:
        """Log at level INFO, unless this message was said before."""
        if message not in self:
            self.add(message)
            rank_zero_info(message, **kwargs)


class _QuietWhereLightningIs(logging.Filter):
    """A program that quietens Lightning's logger means what we say, too."""

    def filter(self, record: logging.LogRecord) -> bool:
        known = logging.root.manager.loggerDict
        asked = (known[name] for name in ("lightning", "lightning.pytorch", "pytorch_lightning") if name in known)
        return all(record.levelno >= logger.level for logger in asked if isinstance(logger, logging.Logger))


log.addFilter(_QuietWhereLightningIs())
