"""Stochastic weight averaging: late in training, average the weights of the epochs under a learning rate of its own."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException
from lit_fast.optim.configure import LRSchedulerConfig

log = logging.getLogger(__name__)


class StochasticWeightAveraging(Callback):
    """Averages the weights with which the epochs begin, from `swa_epoch_start` on; the module ends with the average.

    From that epoch on `SWALR` takes the place of the learning rate scheduler. A module with batch norm gets one more
    epoch in the end, which trains nothing: it only runs forward, to gather the statistics of the averaged weights.

    Args:
        swa_lrs: learning rate to anneal to, for all parameter groups or one for each.
        swa_epoch_start: first epoch that counts, from 1, or as a fraction of `max_epochs`.
        annealing_epochs: epochs over which the learning rate goes to `swa_lrs`.
        annealing_strategy: "cos" or "linear".
        avg_fn: `(average, parameter, number averaged so far) -> new average`; None: all count the same.
        device: where the average is kept; None: where the module is.

    Raises:
        MisconfigurationException: a value that is not allowed; several optimizers or schedulers; a fraction as
            `swa_epoch_start` with `max_epochs=-1`.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
    arXiv:1803.05407.

    Example::

        Trainer(max_epochs=20, callbacks=[StochasticWeightAveraging(swa_lrs=1e-2)])
    """

    reads_gradients = False

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        super().__init__()
        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        counted = isinstance(swa_epoch_start, int)
        for name, value, right, allowed in (
            ("swa_lrs", swa_lrs, all(isinstance(rate, float) and rate > 0 for rate in rates), "floats above 0"),
            (
                "swa_epoch_start",
                swa_epoch_start,
                swa_epoch_start >= 1 if counted else 0 <= swa_epoch_start <= 1,
                "an int from 1, or a float from 0.0 to 1.0",
            ),
            ("annealing_strategy", annealing_strategy, annealing_strategy in ("cos", "linear"), "'cos' and 'linear'"),
            ("avg_fn", avg_fn, avg_fn is None or callable(avg_fn), "a function or None"),
            ("device", device, device is None or isinstance(device, torch.device | str), "a torch.device, str or None"),
        ):
            if not right:
                raise MisconfigurationException(f"StochasticWeightAveraging({name}={value!r}): allowed is {allowed}.")
        self.n_averaged: Tensor | None = None
        self._swa_epoch_start = swa_epoch_start
        self._swa_lrs = swa_lrs
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy = annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._device = device
        self._model_contains_batch_norm: bool | None = None
        self._average_model: Any = None
        self._swa_scheduler: SWALR | None = None
        self._scheduler_state: dict[str, Any] | None = None  # from a checkpoint
        self._init_n_averaged = 0
        self._latest_update_epoch = -1
        self._max_epochs = -1
        self.momenta: dict[_BatchNorm, float | None] = {}

    @property
    def swa_start(self) -> int:
        """First epoch, from 0, that the average takes in."""
        assert isinstance(self._swa_epoch_start, int), "a fraction is resolved when a fit starts"
        return max(self._swa_epoch_start - 1, 0)

    @property
    def swa_end(self) -> int | float:
        """Last epoch, from 0, that the average takes in."""
        return math.inf if self._max_epochs == -1 else self._max_epochs - 1

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: nn.Module) -> bool:
        """Whether any layer keeps batch statistics."""
        return any(isinstance(module, _BatchNorm) for module in pl_module.modules())

    # -- the run

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._average_model = deepcopy(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            raise MisconfigurationException(
                f"StochasticWeightAveraging takes one optimizer with at most one scheduler; configure_optimizers "
                f"returned {len(trainer.optimizers)} and {len(trainer.lr_scheduler_configs)}."
            )
        if isinstance(self._swa_epoch_start, float):
            if trainer.max_epochs == -1:
                raise MisconfigurationException(
                    f"StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start}) is a fraction of max_epochs, "
                    f"and Trainer(max_epochs=-1) has no end; give an int."
                )
            self._swa_epoch_start = int(trainer.max_epochs * self._swa_epoch_start)
        self._model_contains_batch_norm = self.pl_module_contains_batch_norm(pl_module)
        self._max_epochs = trainer.max_epochs
        if self._has_statistics_epoch:
            trainer.fit_loop.max_epochs += 1
        if self._scheduler_state is not None:
            # In time for the checkpoint's optimizer and scheduler, which are restored next.
            self._begin(trainer, pl_module)

    @property
    def _has_statistics_epoch(self) -> bool:
        return bool(self._model_contains_batch_norm) and self._max_epochs != -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._has_statistics_epoch and trainer.current_epoch == self.swa_end + 1:
            # Resumed inside the epoch that gathers statistics, which does not start again.
            self._gather_statistics(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        if self.swa_start <= epoch <= self.swa_end:
            if self._swa_scheduler is None:
                if epoch != self.swa_start:
                    warnings.warn(
                        f"StochasticWeightAveraging begins in epoch {epoch}, after its first one ({self.swa_start}): "
                        f"the checkpoint has no state of it.",
                        stacklevel=2,
                    )
                self._begin(trainer, pl_module)
            if epoch > self._latest_update_epoch:
                assert self.n_averaged is not None
                self.update_parameters(self._average_model, pl_module, self.n_averaged, self._avg_fn)
                self._latest_update_epoch = epoch
        elif self._has_statistics_epoch and epoch == self.swa_end + 1:
            self.transfer_weights(self._average_model, pl_module)
            self.reset_batch_norm_and_save_state(pl_module)
            self._gather_statistics(trainer, pl_module)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """The average moves to its device, and SWALR takes over the learning rate."""
        self._average_model.to(self._device or pl_module.device)
        self.n_averaged = torch.tensor(self._init_n_averaged, dtype=torch.long, device=pl_module.device)
        optimizer = trainer.optimizers[0]
        rates = self._swa_lrs if isinstance(self._swa_lrs, list) else [self._swa_lrs] * len(optimizer.param_groups)
        for rate, group in zip(rates, optimizer.param_groups, strict=False):
            group["initial_lr"] = rate
        self._swa_scheduler = SWALR(
            optimizer,
            swa_lr=rates,  # type: ignore[arg-type]  # torch takes one rate for each group too
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
            last_epoch=trainer.max_epochs if self._annealing_strategy == "cos" else -1,
        )
        before = trainer.lr_scheduler_configs[0] if trainer.lr_scheduler_configs else None
        if before is not None:
            if before.interval != "epoch" or before.frequency != 1:
                warnings.warn(
                    f"StochasticWeightAveraging sets the learning rate every epoch; the scheduler that it replaces did "
                    f"so every {before.frequency} {before.interval}(s).",
                    stacklevel=2,
                )
            log.info("%s takes the place of %s.", type(self._swa_scheduler).__name__, type(before.scheduler).__name__)
        trainer.lr_scheduler_configs[:] = [LRSchedulerConfig(self._swa_scheduler)]

    def _gather_statistics(self, trainer: Any, pl_module: Any) -> None:
        """For one epoch: nothing is trained, and batch norm takes the plain mean over all its batches."""
        trainer.fit_loop._skip_backward = True
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm) and module not in self.momenta:
                self.momenta[module] = module.momentum
                module.momentum = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.fit_loop._skip_backward = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        done = trainer.current_epoch - 1  # the last epoch that was run
        self._restore(trainer)
        if self._has_statistics_epoch and done == self.swa_end + 1:
            return
        if self._max_epochs == -1 or done == self.swa_end:
            self.transfer_weights(self._average_model, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Any) -> None:
        """Undo what was set for the epoch that gathers statistics."""
        if self._has_statistics_epoch:
            trainer.fit_loop.max_epochs = self._max_epochs
            trainer.fit_loop._skip_backward = False
            self.reset_momenta()

    # -- its parts, under Lightning's names

    @staticmethod
    def transfer_weights(src_pl_module: nn.Module, dst_pl_module: nn.Module) -> None:
        """Copy the parameters (not the buffers) of one module into another."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters(), strict=True):
            target.detach().copy_(source.detach())

    def reset_batch_norm_and_save_state(self, pl_module: nn.Module) -> None:
        """Empty the statistics of batch norm and make them plain means; `reset_momenta` undoes the latter."""
        self.momenta = {}
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
                self.momenta[module] = module.momentum
                module.momentum = None

    def reset_momenta(self) -> None:
        """Give batch norm its momentum back."""
        for module, momentum in self.momenta.items():
            module.momentum = momentum
        self.momenta = {}

    @staticmethod
    def update_parameters(
        average_model: nn.Module,
        model: nn.Module,
        n_averaged: Tensor,
        avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """Take the parameters of `model` into the average, and count them in `n_averaged` (int64, shape ())."""
        for average, parameter in zip(average_model.parameters(), model.parameters(), strict=True):
            ours, theirs = average.detach(), parameter.detach().to(average.device)
            ours.copy_(theirs if n_averaged == 0 else avg_fn(ours, theirs, n_averaged.to(average.device)))
        n_averaged += 1

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """The average in which all weights count the same."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_averaged": 0 if self.n_averaged is None else int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._swa_scheduler is None else self._swa_scheduler.state_dict(),
            "average_model_state": None if self._average_model is None else self._average_model.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._init_n_averaged = state_dict["n_averaged"]
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._scheduler_state = state_dict["scheduler_state"]
        if self._average_model is not None and state_dict["average_model_state"] is not None:
            self._average_model.load_state_dict(state_dict["average_model_state"])
