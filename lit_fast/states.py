"""The enumerations of the API, and the record that callbacks read as `trainer.state`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class _Name(str, Enum):
    def __str__(self) -> str:
        return str(self.value)


class TrainerFn(_Name):
    """The method that was called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class TrainerStatus(_Name):
    """How the last run stands."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class GradClipAlgorithmType(str, Enum):
    """How gradients are clipped; equal to its value, so "norm" and "value" compare with it."""

    VALUE = "value"
    NORM = "norm"


class RunningStage(_Name):
    """Which loop runs."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)


@dataclass
class TrainerState:
    """`fn` is the method, `stage` the loop, `status` how it stands."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        return self.status == TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        return self.status in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)
