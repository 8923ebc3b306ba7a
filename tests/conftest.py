"""Shared by all tests: the same random numbers in each, process state put back, GPU tests only on a GPU."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Recorder, oracle and other helpers lie beside the tests and are imported by their file names.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

gc.disable()  # while modules and tests come to stay; `pytest_collection_finish` enables it


# What compiles or interprets for many seconds: at the end of all, one process would wait for the other to do it.
FIRST_OF_EACH_HALF = (("csrc",), ("test_triton.py",))


@pytest.hookimpl(trylast=True)  # after those that are not asked for are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for half, names in enumerate(FIRST_OF_EACH_HALF):  # two processes begin with one half each
        first = [item for item in items if not set(names).isdisjoint(item.path.parts)]
        others = [item for item in items if set(names).isdisjoint(item.path.parts)]
        begin = half * (len(items) // 2)
        items[:] = others[:begin] + first + others[begin:]

    import torch  # not above: who shares the tests out reads this file too, before the workers start

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Takes what is imported by now out of the tests' garbage collections: each would look at a million objects."""
    import torch._dynamo  # noqa: F401  (as the first optimizer does)

    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.enable()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seeds torch, and puts back what a test changed for the whole process."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    environment = dict(os.environ)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    _leave_job()


def _leave_job() -> None:
    """This process is no rank of a job any more, where a test has made it one."""
    group, ranks = (sys.modules.get(f"lit_fast.{name}") for name in ("strategies.process_group", "rank_zero"))
    if group is not None:
        group.disband()
    if ranks is not None:
        vars(ranks.rank_zero_only).pop("assigned", None)


@pytest.fixture
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).parents[1]
