"""Notices and warnings of the first process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from lit_fast import rank_zero
from lit_fast.errors import LightningDeprecationWarning


@pytest.fixture
def said() -> Iterator[list[str]]:
    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    kept: list[str] = []
    handler = Keeps()
    level = rank_zero.log.level
    rank_zero.log.addHandler(handler)
    rank_zero.log.setLevel(logging.INFO)
    yield kept
    rank_zero.log.removeHandler(handler)
    rank_zero.log.setLevel(level)


def test_only_the_first_process_speaks(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rank_zero.rank_zero_info("first %d", 1)
    monkeypatch.setenv("RANK", "1")
    rank_zero.rank_zero_info("second")
    assert said == ["first 1"]
    assert rank_zero.rank_zero_only(lambda: 3)() is None
    assert rank_zero.rank_zero_only.rank == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning", "lightning"])
def test_quietening_lightnings_logger_quietens_ours(said: list[str], name: str) -> None:
    logger = logging.getLogger(name)
    rank_zero.rank_zero_info("heard")
    logger.setLevel(logging.ERROR)
    try:
        rank_zero.rank_zero_info("not heard")
    finally:
        logger.setLevel(logging.NOTSET)
    rank_zero.rank_zero_info("heard again")
    assert said == ["heard", "heard again"]


def test_said_once(said: list[str]) -> None:
    cache = rank_zero.WarningCache()
    for _ in range(2):
        cache.info("once")
    with pytest.warns(UserWarning, match="warned") as seen:
        for _ in range(2):
            cache.warn("warned")
    with pytest.warns(LightningDeprecationWarning, match="old") as old:
        for _ in range(2):
            cache.deprecation("old")
    assert said == ["once"] and len(seen) == len(old) == 1 and cache == {"once", "warned", "old"}
