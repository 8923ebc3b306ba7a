"""Every exception that lit_fast raises on purpose, in one tree.

A message says what was given, what is allowed, and what to change.
"""

from __future__ import annotations


class LitFastError(Exception):
    """Base of every error that lit_fast raises on purpose."""


class MisconfigurationException(LitFastError, ValueError):
    """The caller asked for something contradictory, unknown, or not there yet. Named as in Lightning."""


class MisconfigurationTypeError(MisconfigurationException, TypeError):
    """Something of a type that cannot be meant. A TypeError too, which programs for Lightning catch."""


class MissingMetricError(MisconfigurationException, RuntimeError):
    """A metric is watched that nobody logs. A RuntimeError too, which programs for Lightning catch."""


class ClusterError(MisconfigurationException, RuntimeError):
    """What started the processes and what the Trainer was told do not fit. A RuntimeError too, as in Lightning."""


class RemovedHookError(MisconfigurationException, NotImplementedError):
    """A hook of Lightning 1.x that nothing calls any more; the message names its successor."""


class CheckpointError(LitFastError, RuntimeError):
    """A checkpoint could not be written, read, or applied; the message names the file and the way out."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint. A FileNotFoundError too, which programs for Lightning catch."""


class DataError(LitFastError, ValueError):
    """The data cannot be trained on: no text, an empty loader, a loader that changed under a resume."""


class DataTypeError(DataError, TypeError):
    """What was given as data is none: it cannot be iterated. A TypeError too, as in Lightning."""


class KernelError(LitFastError, RuntimeError):
    """A compiled kernel refused its input (dtype, device, layout, aliasing); the message names the tensor."""


class NonFiniteGradientError(LitFastError, FloatingPointError):
    """A gradient is NaN or infinite, and `nonfinite="raise"` asks for this error. Nothing was changed."""


class ProcessGroupError(LitFastError, RuntimeError):
    """The processes of a job did not come together, or their models differ. All that can be reached raise the same."""


class RankFailedError(LitFastError, RuntimeError):
    """Another process of the job died, raised or hung; the message says which, how, and what it said.

    Args:
        rank: its number among all.
        host, pid: its machine and its number there, where they are known.
    """

    def __init__(self, message: str, rank: int, host: str = "", pid: int | None = None) -> None:
        super().__init__(message)
        self.rank, self.host, self.pid = rank, host, pid

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[str, int, str, int | None]]:
        return type(self), (str(self), self.rank, self.host, self.pid)


class ProfileError(LitFastError, ValueError):
    """A profile could not be read, merged, or compared; the message names the file and what was wanted."""


class NotByHandError(ProfileError, AttributeError):
    """A module reads something of its Trainer that a loop written by hand does not have. An AttributeError too, so
    that `hasattr` and `getattr` with a default find it missing."""


class TrainingSpikeException(LitFastError, RuntimeError):
    """The loss leapt away from its running mean (see SpikeDetection). Named as in Lightning."""

    def __init__(self, batch_idx: int, *args: object) -> None:
        super().__init__(
            f"The training loss spiked in batch {batch_idx}; that batch and the one before it were noted as bad.", *args
        )
        self.batch_idx = batch_idx


class PossibleUserWarning(UserWarning):
    """Something that is allowed and often a mistake. Named as in Lightning, so that programs filter it by this name."""


class LightningDeprecationWarning(DeprecationWarning):
    """Something that works and should be written otherwise. Named as in Lightning."""


class SIGTERMException(SystemExit):
    """SIGTERM ended the run. Named as in Lightning; left alone, it ends the program with exit code 143."""

    def __init__(self) -> None:
        super().__init__(143)


class JobRequeued(SystemExit):
    """A fit was saved and its job put back into the cluster's queue; the exit code is 128 plus the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class TunerExit(LitFastError):
    """Not an error: a search is done, and the run that was begun for it ends. The Trainer catches it."""
