"""Search for the largest batch size that fits into memory."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.tuner.attributes import lightning_getattr, lightning_setattr

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

log = logging.getLogger(__name__)


def _says(exception: BaseException, *parts: str) -> bool:
    return isinstance(exception, RuntimeError) and all(part in str(exception) for part in parts)


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether a GPU ran out of memory."""
    return isinstance(exception, torch.cuda.OutOfMemoryError) or _says(exception, "CUDA", "out of memory")


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether cuDNN failed in the way in which it says that memory ran out."""
    return _says(exception, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether the host ran out of memory (torch has another text for it on Windows)."""
    return _says(exception, "DefaultCPUAllocator: can't allocate memory") or _says(
        exception, "DefaultCPUAllocator: not enough memory"
    )


def is_oom_error(exception: BaseException) -> bool:
    """Whether a device, or the host, ran out of memory."""
    kinds = (is_cuda_out_of_memory, is_cudnn_snafu, is_out_of_cpu_memory)
    return isinstance(exception, MemoryError) or any(is_kind(exception) for is_kind in kinds)


def garbage_collection_cuda() -> None:
    """Free what nobody holds, and give the allocator's cache back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Search:
    """The state of one search: the size, and how it is changed and tried.

    Args:
        fits: runs a few steps at the present size; False where memory ran out.
        get, put: read and set the size.
        rows: rows of the data set; a larger batch holds no more. None: unknown.
    """

    def __init__(
        self,
        fits: Callable[[], bool],
        get: Callable[[], int],
        put: Callable[[int], None],
        rows: Callable[[], int | None],
        max_val: int,
    ) -> None:
        self.fits, self.get, self.put, self.rows, self.max_val = fits, get, put, rows, max_val

    def start(self, size: int) -> None:
        if not self.holds_everything():
            self.put(min(size, self.max_val))

    def holds_everything(self) -> bool:
        rows = self.rows()
        if rows is None or self.get() < rows:
            return False
        log.info("Batch size %d holds the whole data set of %d rows.", self.get(), rows)
        return True

    def at_limit(self) -> bool:
        """Whether the size is the largest that may be tried, which is then taken on trust."""
        if self.get() < self.max_val:
            return False
        log.info("Batch size %d is the limit (max_val): the search stops there.", self.get())
        return True

    def shrink(self, size: int) -> None:
        if size < 1 or size == self.get() == 1:
            raise MisconfigurationException("Memory runs out with batch size 1; make the model or its input smaller.")
        log.info("Batch size %d is too large, next is %d.", self.get(), size)
        self.put(size)

    def grow(self, size: int) -> bool:
        """Go on to `size`, or as far as allowed. False where that is no change."""
        size = min(size, self.max_val)
        if size == self.get() or self.holds_everything():
            return False
        log.info("Batch size %d fits, next is %d.", self.get(), size)
        self.put(size)
        return True


def power_search(search: Search, max_trials: int) -> None:
    """Double until memory runs out, then go back to the last size that fitted."""
    any_fitted = False
    for trial in range(max_trials):
        if search.at_limit():
            return
        if search.fits():
            if trial + 1 == max_trials or not search.grow(2 * search.get()):
                return
            any_fitted = True
        else:
            search.shrink(search.get() // 2)
            if any_fitted:
                return


def binary_search(search: Search, max_trials: int) -> None:
    """Double until memory runs out, then halve the gap between what fits and what does not."""
    low, high, fitted = 1, 0, 0
    while not search.at_limit():
        size = search.get()
        if search.fits():
            fitted += 1
            low = size
            if fitted >= max_trials or (high and high - low <= 1):
                return
            if not search.grow((high + low) // 2 if high else 2 * size):
                return
        else:
            high = size
            search.shrink((high + low) // 2)
            if high - low <= 1:
                return


def _scale_batch_size(
    trainer: Trainer,
    mode: str = "power",
    steps_per_trial: int = 3,
    init_val: int = 2,
    max_trials: int = 25,
    batch_arg_name: str = "batch_size",
    margin: float = 0.05,
    max_val: int = 8192,
) -> int | None:
    """Run the search in a run that has begun; arguments as `BatchSizeFinder`. None under `fast_dev_run`."""
    if trainer.fast_dev_run:
        warnings.warn("The batch size finder is skipped: fast_dev_run is on.", stacklevel=3)
        return None
    module = trainer.lightning_module

    def fits() -> bool:
        return trainer.strategy.reduce_boolean_decision(fits_here())  # the smallest memory decides

    def fits_here() -> bool:
        try:
            trial.run_alone(steps_per_trial)
        except (RuntimeError, MemoryError) as error:
            if not is_oom_error(error):
                raise
            error.__traceback__ = None  # its frames hold the tensors that did not fit
        else:
            return True
        garbage_collection_cuda()
        return False

    garbage_collection_cuda()
    with trainer._trying() as trial:
        search = Search(
            fits,
            lambda: int(lightning_getattr(module, batch_arg_name)),
            lambda size: lightning_setattr(module, batch_arg_name, size),
            trial.rows,
            max_val,
        )
        search.start(init_val)
        {"power": power_search, "binsearch": binary_search}[mode](search, max_trials)
        if mode == "binsearch":
            search.put(max(1, int(search.get() * (1 - margin))))
    size = search.get()
    log.info("Batch size set to %d", size)
    return size
