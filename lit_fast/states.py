"""The enumerations of the API, and the record that callbacks read as `trainer.state`."""

from __future__ import annotations

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
        text = other.value if isinstance(other, Enum) else other
        return isinstance(text, str) and str(self.value).lower() == text.lower()

    def __hash__(self) -> int:
        return hash(str(self.value).lower())

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
        """The same, or None where there is none."""
        try:
            return cls.from_str(value, source)
        except ValueError:
            return None


class _Name(LightningEnum):
    """Compared as the texts they are: the Trainer does so all the time."""

    __eq__ = str.__eq__
    __hash__ = str.__hash__

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


class GradClipAlgorithmType(LightningEnum):
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
