"""Measure the time that training, validation and testing take, and stop training when its time is up."""

from __future__ import annotations

import logging
import math
import re
import time
from datetime import timedelta
from enum import Enum
from typing import Any

from lit_fast.callbacks.callback import Callback
from lit_fast.errors import MisconfigurationException

log = logging.getLogger(__name__)

_STAGES = ("train", "sanity_check", "validate", "test", "predict")


class Interval(str, Enum):
    """How often the time is looked at."""

    step = "step"
    epoch = "epoch"


class Timer(Callback):
    """Stops training after `duration`; resumed runs go on counting where they stopped.

    Args:
        duration: "DD:HH:MM:SS", a `timedelta`, or a dict of `timedelta`'s arguments; None measures only.
        interval: "step" looks at the clock after every batch, "epoch" after every epoch.
        verbose: log a line when the time is up.

    Raises:
        MisconfigurationException: a duration or interval that cannot be read.

    Example::

        timer = Timer(duration="00:12:00:00")
        Trainer(callbacks=[timer]).fit(model)
        print(timer.time_elapsed("train"))  # seconds
    """

    reads_gradients = False

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = Interval.step,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        limit = _duration(duration)
        try:
            self._interval = Interval(interval)
        except ValueError:
            raise MisconfigurationException(f"Timer(interval={interval!r}): allowed are 'step' and 'epoch'.") from None
        self._duration = None if limit is None else limit.total_seconds()
        self._verbose = verbose
        self._start_time: dict[str, float] = {}
        self._end_time: dict[str, float] = {}
        self._offset = 0.0
        self._deadline = -math.inf  # by the monotonic clock; before training there is none to wait for

    def live_hooks(self, trainer: Any = None) -> set[str]:
        unused = ["on_fit_start", "on_train_batch_end", "on_train_epoch_end"] if self._duration is None else []
        unused.append("on_train_epoch_end" if self._interval is Interval.step else "on_train_batch_end")
        return self._without(super().live_hooks(trainer), Timer, *unused)

    def start_time(self, stage: str = "train") -> float | None:
        """When `stage` began, in seconds of the monotonic clock; None before."""
        return self._start_time.get(_stage(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When `stage` ended, in seconds of the monotonic clock; None before."""
        return self._end_time.get(_stage(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds spent in `stage`; for training those of the run that was resumed count too."""
        stage = _stage(stage)
        offset = self._offset if stage == "train" else 0.0
        start = self._start_time.get(stage)
        if start is None:
            return offset
        return self._end_time.get(stage, time.monotonic()) - start + offset

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds left of `duration`; None where there is none."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # a resumed run may have no time left at all
        if self._duration is not None:
            self._check_time_remaining(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin("train")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_time["train"] = time.monotonic()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin("validate")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_time["validate"] = time.monotonic()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin("test")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_time["test"] = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() >= self._deadline and self._interval is Interval.step and self._duration is not None:
            self._check_time_remaining(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._interval is Interval.epoch and self._duration is not None:
            self._check_time_remaining(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset = state_dict.get("time_elapsed", {}).get("train", 0.0)
        self._deadline = -math.inf

    def _begin(self, stage: str) -> None:
        self._end_time.pop(stage, None)
        self._start_time[stage] = time.monotonic()
        if stage == "train" and self._duration is not None:
            self._deadline = self._start_time[stage] + self._duration - self._offset

    def _check_time_remaining(self, trainer: Any) -> None:
        assert self._duration is not None
        elapsed = self.time_elapsed()
        if elapsed >= self._duration and trainer.is_global_zero:  # one clock decides; the other processes hear of it
            trainer.should_stop = True
            if self._verbose:
                log.info("Training time of %s is up: stopping.", timedelta(seconds=int(elapsed)))


def _stage(stage: Any) -> str:
    name = str(getattr(stage, "value", stage))
    if name not in _STAGES:
        raise MisconfigurationException(f"Timer: no stage {name!r}; there are: {', '.join(_STAGES)}.")
    return name


def _duration(duration: str | timedelta | dict[str, int] | None) -> timedelta | None:
    if isinstance(duration, str):
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip())
        if match is None:
            raise MisconfigurationException(
                f"Timer(duration={duration!r}) cannot be read; write DD:HH:MM:SS, such as '00:12:00:00'."
            )
        days, hours, minutes, seconds = map(int, match.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    return timedelta(**duration) if isinstance(duration, dict) else duration
