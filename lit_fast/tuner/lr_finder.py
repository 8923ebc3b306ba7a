"""The learning rate range test: raise the rate every step, and see where the loss falls fastest.

Source: L. N. Smith, Cyclical Learning Rates for Training Neural Networks, 2017, https://arxiv.org/abs/1506.01186.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException
from lit_fast.optim.configure import LRSchedulerConfig
from lit_fast.tuner.attributes import lightning_hasattr, lightning_setattr

if TYPE_CHECKING:
    from lit_fast.module import LightningModule
    from lit_fast.trainer import Trainer

log = logging.getLogger(__name__)

SMOOTHING = 0.98  # share of the running mean that stays at every step
SUPPORTED_MODES = ("linear", "exponential")


class _LRFinder:
    """What a range test found.

    Attributes:
        mode, lr_min, lr_max, num_training: as asked for.
        results: "lr" and "loss", a list each: the rate of every step, and the smoothed loss after it (nan where the
            step gave none).
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        if mode not in SUPPORTED_MODES:
            raise MisconfigurationException(f"mode={mode!r}: allowed are 'linear' and 'exponential'.")
        self.mode = mode
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.num_training = num_training
        self.results: dict[str, Any] = {}
        self._optimal_idx: int | None = None

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss falls fastest per unit of rate.

        Args:
            skip_begin, skip_end: steps left out at both ends.

        Returns:
            The rate; None, and an error in the log, where fewer than two finite losses are left.
        """
        kept = torch.arange(len(self.results["loss"]))
        kept = kept[skip_begin : max(skip_begin, len(kept) - skip_end)]
        losses = torch.tensor(self.results["loss"])[kept]
        finite = torch.isfinite(losses)
        losses, kept = losses[finite], kept[finite]
        self._optimal_idx = None
        if len(losses) < 2:
            log.error(
                "The learning rate finder has no suggestion: %d of %d losses are finite and not skipped, and it needs "
                "2; give it more steps or more data.", len(losses), len(self.results["loss"]),
            )  # fmt: skip
            return None
        rates = torch.tensor(self.results["lr"])[kept]
        slopes = torch.gradient(losses, spacing=[rates])[0]
        self._optimal_idx = int(kept[torch.argmin(slopes)])
        return float(self.results["lr"][self._optimal_idx])

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """Loss over rate, by matplotlib.

        Args:
            suggest: mark `suggestion()`.
            show: open a window.
            ax: axes to draw in; None makes a new figure.

        Returns:
            The figure.

        Raises:
            MisconfigurationException: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MisconfigurationException("plot() needs matplotlib: pip install matplotlib.") from error
        if ax is None:
            _, ax = plt.subplots()
        rates, losses = self.results["lr"], self.results["loss"]
        ax.plot(rates, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest and self.suggestion() is not None and self._optimal_idx is not None:
            ax.plot(rates[self._optimal_idx], losses[self._optimal_idx], markersize=10, marker="o", color="red")
        if show:
            plt.show()
        return ax.figure


class _Ramp(LRScheduler):
    """From the groups' first rates to `end_lr` in `num_iter` steps; the last step runs just below it."""

    def __init__(self, optimizer: Optimizer, mode: str, end_lr: float, num_iter: int) -> None:
        self.mode, self.end_lr, self.num_iter = mode, end_lr, num_iter
        self.lr: list[float] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.lr = [float(rate) for rate in self.base_lrs]
        if self.last_epoch > 0:
            share = (self.last_epoch + 1) / self.num_iter
            if self.mode == "linear":
                self.lr = [base + share * (self.end_lr - base) for base in self.lr]
            else:
                self.lr = [base * (self.end_lr / base) ** share for base in self.lr]
        return self.lr


class _Watch(Callback):
    """Notes the rate and the smoothed loss of every optimizer step, and stops when the loss runs away."""

    reads_gradients = False

    def __init__(self, early_stop_threshold: float | None) -> None:
        self.early_stop_threshold = early_stop_threshold
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.mean = self.best = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first_step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.lrs.append(trainer.lr_scheduler_configs[0].scheduler.lr[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches != 0:
            return
        if not outputs:
            self.losses.append(float("nan"))
            return
        steps = trainer.global_step - self.first_step
        loss = outputs["loss"].item()
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        smoothed = self.mean / (1 - SMOOTHING ** (steps + 1))
        limit = self.early_stop_threshold
        if limit is not None and steps > 1 and smoothed > limit * self.best:
            trainer.should_stop = True
        if smoothed < self.best or steps == 1:
            self.best = smoothed
        self.losses.append(smoothed)


def _determine_lr_attr_name(model: LightningModule, attr_name: str = "") -> str:
    """The name under which the model keeps its rate: `attr_name`, or "lr" or "learning_rate".

    Raises:
        AttributeError: there is none.
    """
    for name in [attr_name] if attr_name else ["lr", "learning_rate"]:
        if lightning_hasattr(model, name):
            return name
    wanted = f"attribute {attr_name!r}" if attr_name else "attribute 'lr' or 'learning_rate'"
    raise AttributeError(
        f"The learning rate finder sets the rate that it finds, and {type(model).__name__} has no {wanted}, in itself "
        f"or in its hparams. Name it (attr_name=...), or pass update_attr=False."
    )


def _lr_find(
    trainer: Trainer,
    model: LightningModule,
    min_lr: float = 1e-8,
    max_lr: float = 1,
    num_training: int = 100,
    mode: str = "exponential",
    early_stop_threshold: float | None = 4.0,
    update_attr: bool = False,
    attr_name: str = "",
) -> _LRFinder | None:
    """Run the range test in a fit that has begun; arguments as `Tuner.lr_find`. None under `fast_dev_run`."""
    if trainer.fast_dev_run:
        warnings.warn("The learning rate finder is skipped: fast_dev_run is on.", stacklevel=3)
        return None
    if update_attr:
        attr_name = _determine_lr_attr_name(model, attr_name)
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"The learning rate finder needs exactly one optimizer; {type(model).__name__}.configure_optimizers "
            f"returned {len(trainer.optimizers)}."
        )
    finder, watch = _LRFinder(mode, min_lr, max_lr, num_training), _Watch(early_stop_threshold)
    (optimizer,) = trainer.optimizers
    with trainer._trying() as trial:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = min_lr
        ramp = _Ramp(optimizer, mode, max_lr, num_training)
        trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(ramp, interval="step")]
        trial.fit([watch], epoch=trainer.current_epoch, max_steps=num_training, limit_val_batches=num_training)
    if len(watch.losses) < num_training:
        log.info("The learning rate finder stopped after %d of %d steps.", len(watch.losses), num_training)
    finder.results = trainer.strategy.broadcast({"lr": watch.lrs, "loss": watch.losses})  # one rate for all processes
    if update_attr:
        rate = finder.suggestion()
        if rate is not None:
            lightning_setattr(model, attr_name, rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            log.info("Learning rate set to %s", rate)
    return finder
