"""Which file `ckpt_path` means, and where an interrupted run is saved."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_fast.checkpoint import sharded
from lit_fast.errors import CheckpointError, CheckpointNotFoundError, MisconfigurationException, PossibleUserWarning
from lit_fast.states import TrainerFn
from lit_fast.strategies.environments.slurm import srun_used

if TYPE_CHECKING:
    from lit_fast.trainer import Trainer

# Directories that this process wrote checkpoints into: a second Trainer in one program (another fold, another trial)
# is no continuation of the first.
_written: set[str] = set()


def note_written(path: str | Path) -> None:
    _written.add(os.path.dirname(os.path.abspath(path)))


def find(trainer: Trainer, ckpt_path: str | Path | None) -> str | None:
    """The file that `ckpt_path` names: a path, "last", "best", "hpc", or None.

    "last" is, for a fit, the newest file that a fit can go on from, of this run or of earlier runs of this program
    under the same logger; for the other stages the newest `last.ckpt`, as in Lightning. For a fit, None means "hpc" in
    a job of SLURM's where a requeued fit left its file, "last" with an `OnExceptionCheckpoint` whose file is there.

    Raises:
        CheckpointNotFoundError: there is no such file.
        MisconfigurationException: "best" or "hpc" where nothing of the kind was saved, or a model registry.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    if ckpt_path is None and fitting and srun_used() and _requeued(trainer):
        _warn_of_another_job(trainer)
        ckpt_path = "hpc"
    if ckpt_path is None:
        if not fitting or not any(os.path.exists(path) for path in _rescued(trainer)):
            return None
        warnings.warn(
            "fit(ckpt_path=None) goes on from the newest checkpoint, since an OnExceptionCheckpoint was given and its "
            "file is there; remove that file to start anew, or pass ckpt_path='last' to say so.",
            stacklevel=3,
        )
        ckpt_path = "last"
    if ckpt_path == "last":
        return _last(trainer, fitting)
    if ckpt_path == "best":
        return _best(trainer)
    if ckpt_path == "hpc":
        return _newest_requeued(trainer)
    if not isinstance(ckpt_path, str | os.PathLike):
        raise CheckpointError(
            f"ckpt_path={ckpt_path!r} is a {type(ckpt_path).__name__}; a run begins from a path (str or pathlib.Path). "
            f"An open file is read by load_from_checkpoint."
        )
    name = os.path.expanduser(os.fspath(ckpt_path))
    if name.startswith("registry"):
        raise MisconfigurationException(
            f"ckpt_path={name!r}: model registries are not built yet; download the file and pass its path."
        )
    if "://" not in name and not os.path.exists(name):
        raise CheckpointNotFoundError(
            f"There is no checkpoint {name!r}; pass the path of one, 'last', or None to start."
        )
    return name


def _last(trainer: Trainer, fitting: bool) -> str | None:
    if fitting:
        newest = max(_candidates(trainer), default=None)
        path = None if newest is None else str(newest[-1])
    else:
        files = [*_rescued(trainer)]
        for callback in trainer.checkpoint_callbacks:
            if hasattr(callback, "_find_last_checkpoints"):
                files += callback._find_last_checkpoints(trainer)
        path = max(filter(os.path.exists, files), key=os.path.getmtime, default=None)
    if path is None:
        follows = (
            "the run starts anew" if fitting else "the model keeps its weights; set ModelCheckpoint(save_last=True)"
        )
        warnings.warn(f"ckpt_path='last': no checkpoint was found, {follows}.", stacklevel=4)
    return path


def _best(trainer: Trainer) -> str:
    if not trainer.checkpoint_callback:
        raise MisconfigurationException(
            "ckpt_path='best' needs a ModelCheckpoint among the callbacks, and there is none; add one, or pass a path."
        )
    if len(trainer.checkpoint_callbacks) > 1:
        warnings.warn("ckpt_path='best': of several checkpoint callbacks, the first one's best is taken.", stacklevel=4)
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best:
        why = " (fast_dev_run saves none)" if trainer.fast_dev_run else ""
        raise MisconfigurationException(
            f"ckpt_path='best': no checkpoint was saved so far{why}; fit with a ModelCheckpoint first, or pass a path."
        )
    return str(best)


def _requeued(trainer: Trainer) -> dict[int, Path]:
    """What fits left whose jobs were requeued, by number."""
    found = Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")
    return {int(path.stem[9:]): path for path in found if path.stem[9:].isdecimal()}


def _newest_requeued(trainer: Trainer) -> str:
    found = _requeued(trainer)
    if not found:
        raise MisconfigurationException(
            f"ckpt_path='hpc': there is no hpc_ckpt_<number>.ckpt in {os.fspath(trainer.default_root_dir)!r}."
        )
    return str(found[max(found)])


def _warn_of_another_job(trainer: Trainer) -> None:
    """SLURM counts how often a job began anew: one that did not never wrote the file itself."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        warnings.warn(
            f"fit(ckpt_path=None) goes on from {_newest_requeued(trainer)}, which a requeued job left in "
            f"default_root_dir; this job was not requeued. Remove the file, or set another default_root_dir, to start "
            f"anew.",
            category=PossibleUserWarning,
            stacklevel=4,
        )


def requeue_path(trainer: Trainer) -> Path:
    """Where a fit is saved whose job goes back into the queue: the next number, in Lightning's place."""
    return Path(trainer.default_root_dir) / f"hpc_ckpt_{max(_requeued(trainer), default=0) + 1}.ckpt"


def _rescued(trainer: Trainer) -> list[str]:
    """Where OnExceptionCheckpoints write."""
    paths = (getattr(callback, "ckpt_path", None) for callback in trainer.checkpoint_callbacks)
    return [os.fspath(path) for path in paths if path]


def _candidates(trainer: Trainer) -> Iterator[tuple[int, int, int, Path]]:
    """What a fit can go on from, of this run and earlier versions of it: (version, time of writing, step, path)."""
    for path in map(Path, _rescued(trainer)):
        if path.exists():
            yield from _resumable(path, 0)
    for callback in trainer.checkpoint_callbacks:
        if not getattr(callback, "dirpath", None):
            continue
        directory = Path(callback.dirpath)
        directories = [directory]
        if re.fullmatch(r"version_\d+", directory.parent.name):  # each run of a logger gets a version of its own
            earlier = directory.parent.parent.glob(f"version_*/{directory.name}")
            others = _written - {os.path.abspath(directory)}
            directories = [folder for folder in sorted(earlier) if os.path.abspath(folder) not in others]
        for folder in directories:
            number = re.fullmatch(r"version_(\d+)", folder.parent.name)
            for path in folder.glob("*.ckpt"):
                yield from _resumable(path, int(number[1]) if number else 0)


def _resumable(path: Path, version: int) -> Iterator[tuple[int, int, int, Path]]:
    try:
        written = path.stat().st_mtime_ns
        if sharded.is_sharded(path):
            held = sharded.meta(path)
        else:
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        step = int(held["global_step"])
    except Exception as error:
        warnings.warn(f"ckpt_path='last' passes over {path}: it cannot be read ({error}).", stacklevel=5)
        return
    if "optimizer_states" in held:
        yield version, written, step, path


def interrupt_path(trainer: Trainer) -> Path | None:
    """Where an interrupted run is saved: "last.ckpt" beside the run's other checkpoints.

    "last-v1.ckpt" ... where that name is taken by a file that this run neither wrote nor went on from.
    """
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "dirpath", None):
            ours = [os.path.abspath(p) for p in (getattr(callback, "last_model_path", ""), trainer.ckpt_path) if p]
            path, version = Path(callback.dirpath).absolute() / "last.ckpt", 0
            while path.exists() and str(path) not in ours:
                version += 1
                path = path.with_name(f"last-v{version}.ckpt")
            return path
    return None
