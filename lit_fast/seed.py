"""Random seeds: one call for every generator, for loader workers, and a guard that puts generators back."""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lit_fast.errors import MisconfigurationException

log = logging.getLogger(__name__)

min_seed_value = 0
max_seed_value = 2**32 - 1  # numpy's legacy generator takes 32 bits

_MASK64 = 2**64 - 1


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed the generators of Python, numpy and torch (every device's), and tell subprocesses which seed.

    Args:
        seed: the seed, 0 to 2**32 - 1; left out, `PL_GLOBAL_SEED` of the environment, or 0 without it.
        workers: also give DataLoader workers of the Trainer seeds of their own (`PL_SEED_WORKERS`).
        verbose: log the seed; warn where none was found.

    Returns:
        The seed that is used.

    Raises:
        MisconfigurationException: a seed that is no integer, or out of bounds.

    Example::

        >>> seed_everything(42, verbose=False)
        42
    """
    if seed is None and "PL_GLOBAL_SEED" not in os.environ:
        seed = 0
        if verbose:
            warnings.warn("No seed was given, and PL_GLOBAL_SEED is not set: the seed is 0.", stacklevel=2)
    given = os.environ["PL_GLOBAL_SEED"] if seed is None else seed
    source = "PL_GLOBAL_SEED" if seed is None else "seed_everything"
    try:
        seed = int(given)
    except (TypeError, ValueError):
        raise MisconfigurationException(
            f"{source}: {given!r} is no integer; give a number from 0 to 2**32 - 1."
        ) from None
    if not min_seed_value <= seed <= max_seed_value:
        raise MisconfigurationException(f"{source}: {seed} is out of bounds; give a number from 0 to 2**32 - 1.")

    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)
    if verbose:
        log.info("Seed set to %d", seed)
    return seed


def reset_seed() -> None:
    """Seed again as `seed_everything` last did; nothing where it never was called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        seed_everything(int(seed), workers=os.environ.get("PL_SEED_WORKERS", "0") == "1", verbose=False)


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Put every generator back, on leaving, to where it was on entering.

    Args:
        include_cuda: the generators of CUDA devices too; False in a forked process, which cannot use CUDA.

    Example::

        with isolate_rng():
            torch.rand(3)  # the numbers after the block are as if this had not been
    """
    python, torch_cpu = random.getstate(), torch.get_rng_state()
    numpy = _numpy()
    numpy_state = None if numpy is None else numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if include_cuda and torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torch_cpu)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Seed a DataLoader worker by (base seed, worker, rank): the same numbers as Lightning gives that worker.

    torch gives worker `i` the seed base + i and leaves Python's and numpy's generators alike in all workers,
    or to the seed of the parent; here every generator of every worker starts elsewhere.
    """
    if rank is None:
        rank = next(
            (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ),
            0,
        )
    base = torch.initial_seed() - worker_id
    seeds = _seed_sequence(base, worker_id, rank, 4)
    torch.manual_seed(seeds[0])
    random.seed((seeds[1] << 32) | seeds[2])
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(numpy.random.SeedSequence([base, worker_id, rank]).generate_state(4))


def seed_workers(loaders: Any, rank: int) -> None:
    """After `seed_everything(workers=True)`, let every loader that has workers seed them by `pl_worker_init_function`.

    Args:
        loaders: a DataLoader, a container of them, or a CombinedLoader; one with a `worker_init_fn` keeps it.
    """
    if os.environ.get("PL_SEED_WORKERS", "0") != "1":
        return
    for loader in tree_leaves(getattr(loaders, "flattened", loaders)):
        if getattr(loader, "num_workers", 0) and getattr(loader, "worker_init_fn", loader) is None:
            loader.worker_init_fn = functools.partial(pl_worker_init_function, rank=rank)


def _seed_sequence(base: int, worker_id: int, rank: int, count: int) -> list[int]:
    """64-bit seeds: MurmurHash3's finalizer (fmix64), then Knuth's MMIX generator."""
    x = (base << 32) | (worker_id << 16) | rank
    x ^= x >> 33
    x = (x * 0xFF51AFD7ED558CCD) & _MASK64
    x ^= x >> 33
    x = (x * 0xC4CEB9FE1A85EC53) & _MASK64
    x ^= x >> 33
    seeds = []
    for _ in range(count):
        x = (x * 6364136223846793005 + 1) & _MASK64
        seeds.append(x)
    return seeds


def _numpy() -> Any:
    """numpy, where it is installed. torch has imported it then, so that this costs nothing."""
    if "numpy" in sys.modules:
        return sys.modules["numpy"]
    try:
        import numpy
    except ImportError:
        return None
    return numpy
