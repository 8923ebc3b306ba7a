"""Stop training when a metric no longer improves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException, MissingMetricError

log = logging.getLogger(__name__)


class EarlyStoppingReason(Enum):
    """Why training was stopped; the numbers stand in checkpoints."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Watch one metric and ask the Trainer to stop when it has not improved for a while.

    Args:
        monitor: name of the metric, as given to `self.log`.
        min_delta: a change smaller than this is no improvement (its sign does not matter to the caller).
        patience: checks without improvement after which training stops. A check runs once per validation, or
            once per training epoch.
        verbose: log a line at every improvement and at the stop.
        mode: "min" where smaller is better, "max" where larger is.
        strict: a missing metric is an error; with False the check is skipped.
        check_finite: stop when the metric is NaN or infinite.
        stopping_threshold: stop at once when the metric is better than this.
        divergence_threshold: stop at once when the metric is worse than this.
        check_on_train_epoch_end: check at the end of training epochs (True) or of validation (False); left
            out, decided by how often validation runs.
        log_rank_zero_only: only the first process logs the lines that `verbose` asks for.

    Raises:
        MisconfigurationException: `mode` is neither "min" nor "max".
        MissingMetricError: at a check, the metric is missing.

    Example::

        trainer = Trainer(callbacks=[EarlyStopping(monitor="val_loss", patience=3)])
    """

    reads_gradients = False
    mode_dict: ClassVar[dict[str, Callable[..., Tensor]]] = {"min": torch.lt, "max": torch.gt}
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        super().__init__()
        if mode not in self.mode_dict:
            raise MisconfigurationException(f"EarlyStopping(mode={mode!r}): allowed are 'min' and 'max'.")
        self.monitor = monitor
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        # signed, so that `current - min_delta` must beat the best score in either mode
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.best_score = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._check_on_train_epoch_end = check_on_train_epoch_end

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """The comparison that says "better": `torch.lt` or `torch.gt`."""
        return self.mode_dict[self.mode]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._check_on_train_epoch_end is None:
            # with several validations per epoch, or epochs without one, a check belongs to the validation
            self._check_on_train_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        self.patience = state_dict["patience"]
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")

    def _should_skip_check(self, trainer: Any) -> bool:
        return trainer.state.fn != "fit" or bool(trainer.sanity_checking)

    def _validate_condition_metric(self, logs: Mapping[str, Any]) -> bool:
        if self.monitor in logs:
            return True
        message = (
            f"EarlyStopping(monitor={self.monitor!r}) found no such metric; logged are: "
            f"{', '.join(map(repr, logs)) or 'none'}. Log it with self.log({self.monitor!r}, value), monitor "
            f"one of the logged ones, or pass strict=False to skip the check."
        )
        if self.strict:
            raise MissingMetricError(message)
        if self.verbose:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False

    def _run_early_stopping_check(self, trainer: Any) -> None:
        logs = trainer.callback_metrics
        if trainer.fast_dev_run:
            return
        should_stop, reason = False, None
        if self._validate_condition_metric(logs):
            should_stop, reason = self._evaluate_stopping_criteria(torch.as_tensor(logs[self.monitor]).squeeze())
        if trainer.strategy.reduce_boolean_decision(should_stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
        if reason and self.verbose and (trainer.is_global_zero or not self.log_rank_zero_only):
            log.info(reason)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Whether to stop, and a sentence that says why or what improved."""
        best = self.best_score.to(current.device)
        if self.check_finite and not torch.isfinite(current):
            self.stopping_reason = EarlyStoppingReason.NON_FINITE_METRIC
            return True, f"{self.monitor} = {current} is not finite (best so far {best:.3f}): stopping."
        if self.stopping_threshold is not None and self.monitor_op(current, self.stopping_threshold):
            self.stopping_reason = EarlyStoppingReason.STOPPING_THRESHOLD
            sign = self.order_dict[self.mode]
            return (
                True,
                f"{self.monitor} = {current} {sign} stopping_threshold {self.stopping_threshold}: stopping.",
            )
        if self.divergence_threshold is not None and self.monitor_op(-current, -self.divergence_threshold):
            self.stopping_reason = EarlyStoppingReason.DIVERGENCE_THRESHOLD
            return True, (
                f"{self.monitor} = {current} is worse than divergence_threshold {self.divergence_threshold}: stopping."
            )
        if self.monitor_op(current - self.min_delta, best):
            self.best_score = current
            self.wait_count = 0
            return False, f"{self.monitor} improved from {best:.3f} to {current:.3f}."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            return True, (f"{self.monitor} did not improve in {self.wait_count} checks (best {best:.3f}): stopping.")
        return False, None
