"""Log how busy the device is, and how full its memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch

from lit_fast.callbacks._logging_steps import evaluation_logs, training_logs
from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException

_BATCH_HOOKS = tuple(f"on_{stage}_batch_{end}" for stage in ("train", "validation", "test") for end in ("start", "end"))
_HOOKS = (*_BATCH_HOOKS, "on_validation_start", "on_test_start")


class DeviceStatsMonitor(Callback):
    """Sends the device's figures to the loggers before and after every batch that is logged.

    A figure's name is `DeviceStatsMonitor.<hook>/<figure>`, with the logger's own separator for "/". On a CPU they are
    `cpu_percent`, `cpu_vm_percent` (memory) and `cpu_swap_percent`, of the whole system, in percent; on a CUDA device
    those of `torch.cuda.memory_stats` (bytes and counts of PyTorch's allocator).

    Args:
        cpu_stats: log the CPU's figures too. None: where the model is trained on the CPU.
        filter_keys: log these figures alone, such as {"cpu_percent"} or {"allocated_bytes.all.peak"}. None: all.

    Raises:
        MisconfigurationException: a Trainer without logger.
        ModuleNotFoundError: the CPU's figures are asked for, and psutil is not installed.

    Example::

        Trainer(callbacks=[DeviceStatsMonitor(filter_keys={"cpu_percent"})])
    """

    reads_gradients = False

    def __init__(self, cpu_stats: bool | None = None, filter_keys: Iterable[str] | None = None) -> None:
        super().__init__()
        if isinstance(filter_keys, str):
            raise MisconfigurationException(
                f"DeviceStatsMonitor(filter_keys={filter_keys!r}): pass a set of names: {{{filter_keys!r}}}."
            )
        self._cpu_stats = cpu_stats
        self._filter_keys = None if filter_keys is None else frozenset(filter_keys)
        self._batches = 0  # of the validation or test that runs, over all its loaders

    def live_hooks(self, trainer: Any = None) -> set[str]:
        live = super().live_hooks(trainer)
        if trainer is None:
            return live
        nothing = self._cpu_stats is False and trainer.strategy.root_device.type == "cpu"
        unused = _HOOKS if nothing or not trainer.log_every_n_steps else ()
        return self._without(live, DeviceStatsMonitor, *unused)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not trainer.loggers:
            raise MisconfigurationException("DeviceStatsMonitor needs a logger; the Trainer has logger=False.")
        reads_cpu = trainer.strategy.root_device.type == "cpu" if self._cpu_stats is None else self._cpu_stats
        if reads_cpu and importlib.util.find_spec("psutil") is None:
            raise ModuleNotFoundError(
                "DeviceStatsMonitor reads the CPU's figures through psutil, which is not installed: "
                "`pip install psutil`, or pass cpu_stats=False.",
                name="psutil",
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if training_logs(trainer, batch_idx):
            self._log_step(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if training_logs(trainer, batch_idx):
            self._log_step(trainer, "on_train_batch_end")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._batches = 0

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._before(trainer, "on_validation_batch_start")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._after(trainer, "on_validation_batch_end")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._batches = 0

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._before(trainer, "on_test_batch_start")

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._after(trainer, "on_test_batch_end")

    def _before(self, trainer: Any, hook: str) -> None:
        self._batches += 1
        self._after(trainer, hook)

    def _after(self, trainer: Any, hook: str) -> None:
        if evaluation_logs(trainer, self._batches):
            self._log(trainer, hook, trainer.fit_loop.windows_completed())

    def _log_step(self, trainer: Any, hook: str) -> None:
        """A row beside what the step that is still running logs."""
        self._log(trainer, hook, trainer.fit_loop.epoch_loop._batches_that_stepped + 1)

    def _log(self, trainer: Any, hook: str, step: int) -> None:
        stats = self._stats(trainer.strategy.root_device)
        for logger in trainer.loggers:
            prefix = f"{type(self).__qualname__}.{hook}{logger.group_separator}"
            logger.log_metrics({prefix + name: value for name, value in stats.items()}, step=step)

    def _stats(self, device: torch.device) -> dict[str, float]:
        stats: dict[str, float] = {}
        if device.type == "cuda":
            stats.update(torch.cuda.memory_stats(device))
        if self._cpu_stats or (self._cpu_stats is None and device.type == "cpu"):
            stats.update(cpu_stats())
        if self._filter_keys is None:
            return stats
        return {name: value for name, value in stats.items() if name in self._filter_keys}


def cpu_stats() -> dict[str, float]:
    """The load of the whole system in percent: memory, processors (since the last call), swap."""
    import psutil

    return {
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_percent": psutil.cpu_percent(),
        "cpu_swap_percent": psutil.swap_memory().percent,
    }
