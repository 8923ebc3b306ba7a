"""The enumerations of the API, and the record that callbacks read as `trainer.state`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from typing_extensions import Self


class LightningEnum(str, Enum):
    """An enumeration of texts that are compared without regard to upper and lower case. Named as in Lightning.

    Example:
        >>> Kind = LightningEnum("Kind", {"MEAN": "mean"})
        >>> Kind.from_str("Mean"), Kind.MEAN == "MEAN", Kind.try_from_str("sum")
        (<Kind.MEAN: 'mean'>, True, None)
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        text = other._value_ if isinstance(other, Enum) else other
        return isinstance(text, str) and str(self._value_).lower() == text.lower()

    def __hash__(self) -> int:
        return hash(str(self._value_).lower())

    @classmethod
    def from_str(cls, value: str, source: Literal["key", "value", "any"] = "key") -> Self:
        """The member whose name ("key"), value, or either ("any") is `value`.

        Raises:
            ValueError: there is none.
        """
        for member in cls:
            texts = {"key": (member.name,), "value": (str(member.value),), "any": (member.name, str(member.value))}
            if value.lower() in map(str.lower, texts[source]):
                return member
        raise ValueError(f"{value!r} is no {cls.__name__}; allowed are {', '.join(cls.__members__)}.")

    @classmethod
    def try_from_str(cls, value: str, source: Literal["key", "value", "any"] = "key") -> Self | None:
        """The same, or None, with a warning, where there is none."""
        try:
            return cls.from_str(value, source)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            return None


class TrainerFn(LightningEnum):
    """The method that was called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class TrainerStatus(LightningEnum):
    """How the last run stands."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class GradClipAlgorithmType(LightningEnum):
    """How gradients are clipped; equal to its value, so "norm" and "value" compare with it."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        return val in GradClipAlgorithmType.supported_types()

    @staticmethod
    def supported_types() -> list[str]:
        return [member.value for member in GradClipAlgorithmType]


class RunningStage(LightningEnum):
    """Which loop runs."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """As in `val_dataloader`."""
        return "val" if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING) else self.value


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
        return self.status.stopped
