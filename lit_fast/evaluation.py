"""The evaluation loop: validation inside a fit, the sanity check before it, and `Trainer.validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lit_fast.binding import positional_arguments
from lit_fast.checkpoint import rng
from lit_fast.config import batch_limit
from lit_fast.data.position import tell_epoch
from lit_fast.errors import DataError, MisconfigurationException
from lit_fast.hooks import is_overridden
from lit_fast.loop import length_of
from lit_fast.module import LightningModule
from lit_fast.states import TrainerFn

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer


class EvaluationLoop:
    """Runs `validation_step` over every validation loader, without gradients, in evaluation mode."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.loaders: list[Any] | None = None
        self.limits: list[int | None] = []
        self._seen: list[int] = []  # batches of each loader in this run, which counts what is logged per batch
        self.batch_idx, self.dataloader_idx = -1, 0  # what runs now; the progress bar reads them from its thread
        self.batches_run = 0  # in the validation that runs or ran last, over all loaders
        self.rng_before: dict[str, Any] = {}  # what a checkpoint holds that is written while validation runs
        self._training_modes: dict[torch.nn.Module, bool] = {}

    def load_data(self) -> None:
        """Ask for the validation loaders, once per run.

        Raises:
            DataError: what was given is no loader.
        """
        if self.loaders is not None:
            return
        given = self.trainer._request_loader("val_dataloader")
        loaders = list(given) if isinstance(given, list | tuple) else [given]
        if isinstance(given, Mapping):
            loaders = list(given.values())
        for loader in loaders:
            if not isinstance(loader, Iterable):
                raise DataError(
                    f"The validation data is {type(loader).__name__}, which cannot be iterated; pass a DataLoader, "
                    f"any iterable of batches, or a list of them."
                )
        self.loaders = loaders
        limit = self.trainer.config.limit_val_batches
        self._seen = [0] * len(loaders)
        self.limits = [batch_limit("limit_val_batches", limit, length_of(loader)) for loader in loaders]

    @property
    def num_batches(self) -> list[int | float]:
        limits: list[int | float] = [float("inf") if limit is None else limit for limit in self.limits]
        if self.trainer.sanity_checking:
            sanity = self.trainer.config.num_sanity_val_steps
            return [limit if sanity == -1 else min(sanity, limit) for limit in limits]
        return limits

    def run_in_fit(self, release_gradients: bool) -> None:
        """Validation in the middle of a fit: afterwards the training state is as before."""
        log = self.trainer._metric_log
        batch = log.batch
        log.collect()
        self.rng_before = rng.capture()
        self.trainer._stage = "validate"
        try:
            if release_gradients:
                self.trainer._call_module("on_validation_model_zero_grad")
            self.run()
        finally:
            self.trainer._stage = "train"
            log.stage, log.batch, log.epoch_end = "train", batch, False

    def sanity_check(self) -> None:
        """A few validation batches before the first step, so that a mistake there does not cost an epoch."""
        from lit_fast.seed import isolate_rng

        trainer = self.trainer
        trainer._stage = "sanity_check"
        trainer._metric_log.sanity_checking = True
        with isolate_rng():
            trainer._call_callbacks("on_sanity_check_start")
            self.run()
            trainer._call_callbacks("on_sanity_check_end")
        trainer._metric_log.drop_values()
        trainer._metric_log.sanity_checking, trainer._metric_log.stage = False, "train"
        trainer._stage = "train"

    def run(self) -> list[dict[str, float]]:
        """All loaders once; returns the logged values of each, as `Trainer.validate` does."""
        trainer = self.trainer
        log = trainer._metric_log
        log.stage, log.epoch_end = "validate", False
        # Inside a fit what a hook makes (a mask, a mean) may be trained with: not in inference mode, as in Lightning.
        inference = trainer.config.inference_mode and trainer.state.fn != TrainerFn.FITTING
        no_grad = torch.inference_mode() if inference else torch.no_grad()
        profiler = trainer._profiler
        with no_grad, profiler.phase("validation") if profiler is not None else nullcontext():
            self.load_data()
            return self._run() if sum(self.num_batches) else []

    def _run(self) -> list[dict[str, float]]:
        trainer, log = self.trainer, self.trainer._metric_log
        self.batches_run = 0
        trainer._call_module("on_validation_model_eval")
        trainer._call("on_validation_start")
        trainer._call("on_validation_epoch_start")
        assert self.loaders is not None
        several = len(self.loaders) > 1
        for index, (loader, limit) in enumerate(zip(self.loaders, self.num_batches, strict=True)):
            tell_epoch(loader, trainer._progress.epoch)
            self._run_loader(index, loader, limit, several)
        log.collect()
        log.epoch_end = True
        trainer._call("on_validation_epoch_end")
        logged = log.collect()
        if not trainer.sanity_checking:
            trainer._log_metrics(logged)
        results = _by_loader(log, logged, len(self.loaders))
        if trainer.validating and trainer.state.fn == TrainerFn.FITTING:
            trainer._progress.stage = "validated"
        trainer._call("on_validation_end")
        trainer._call_module("on_validation_model_train")
        log.end_epoch()
        log.batch = None
        return results

    def _run_loader(self, index: int, loader: Any, limit: int | float, several: bool) -> None:
        trainer, log, module = self.trainer, self.trainer._metric_log, self.trainer.lightning_module
        self.batch_idx, self.dataloader_idx = -1, index
        suffix = f"/dataloader_idx_{index}" if several else ""
        where = (index,) if several else ()
        step = trainer.config.precision.bind(_bind_step(module.validation_step, several), trainer.config.device)
        table = log.table("validation_step", "validate", suffix)
        receive = trainer._batch_receivers(log, "validate", index)
        starts = trainer._bound_hooks("on_validation_batch_start", suffix)
        ends = trainer._bound_hooks("on_validation_batch_end", suffix)
        batches = iter(loader) if limit == float("inf") else islice(loader, int(limit))
        for batch_idx, given in enumerate(batches):
            self.batch_idx = batch_idx
            batch = given
            for function in receive:
                batch = function(batch)
            log.batch = batch
            for hook in starts:
                hook(batch, batch_idx, *where)
            log.current = table
            output = step(batch, batch_idx, *where)
            for hook in ends:
                hook(output, batch, batch_idx, *where)
            if log.evaluates_steps and not trainer.sanity_checking:
                trainer._log_metrics(log.collect(suffix), step=self._seen[index])
            self._seen[index] += not trainer.sanity_checking
            self.batches_run += 1
            if trainer._interrupt is not None:
                trainer._raise_interrupt()

    def model_eval(self) -> None:
        """Put every submodule in evaluation mode, remembering which were training."""
        module = self.trainer.lightning_module
        self._training_modes = {child: child.training for child in module.modules()}
        module.eval()

    def model_train(self) -> None:
        """Give every submodule the mode back that it had before `model_eval`."""
        for child, training in self._training_modes.items():
            child.training = training
        self._training_modes = {}


def _bind_step(function: Callable[..., Any], several: bool) -> Callable[..., Any]:
    """`validation_step` with as many of (batch, batch_idx, dataloader_idx) as it takes.

    Raises:
        MisconfigurationException: there are several loaders and the step does not take `dataloader_idx`.
    """
    takes = positional_arguments(function)
    if several and takes < 3:
        raise MisconfigurationException(
            "There are several validation loaders, but validation_step does not take `dataloader_idx`; define "
            "validation_step(self, batch, batch_idx, dataloader_idx=0)."
        )
    if takes == 1:
        return lambda batch, batch_idx: function(batch)
    return function


def _by_loader(log: Any, logged: dict[str, Any], loaders: int) -> list[dict[str, float]]:
    from lit_fast.metrics import to_float

    results: list[dict[str, float]] = []
    for index in range(loaders):
        mine = f"/dataloader_idx_{index}"
        results.append(
            {
                name: to_float(value)
                for name, value in logged.items()
                if "/dataloader_idx_" not in name or name.endswith(mine)
            }
        )
    return results


def can_validate(module: LightningModule) -> bool:
    return is_overridden("validation_step", module, LightningModule)
