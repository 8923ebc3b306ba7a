"""Sharded checkpoints: a directory that all processes write at once, each what it holds; whole or not there.

In it lie the files of torch.distributed.checkpoint (`.metadata`, `*.distcp`), with the model under "state_dict" and
each optimizer under "optimizer_<i>" by parameter names, as Lightning's ModelParallelStrategy writes them; `meta.pt`,
with all other keys of a checkpoint; and `commit.json`, written last, with the size and the CRC-32 of each file.

The directory is written under a temporary name beside its target, synced, and takes the target's place in one step
(an exchange of names where there is something already). Whatever reads such a directory can be laid out in another
way, or whole in one process: each process reads the ranges that it needs, and nothing is sent.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lit_fast.checkpoint import io, temporaries
from lit_fast.checkpoint.files import remove
from lit_fast.errors import CheckpointError

META, COMMIT, DCP_INDEX = "meta.pt", "commit.json", ".metadata"
MODEL = "state_dict"
_MODEL_KEYS = (MODEL, "model")  # "model": Lightning's FSDPStrategy
_OPTIMIZER = re.compile(r"optimizer_(\d+)$")
_CHUNK = 8 << 20  # bytes
Like = Callable[[str], Tensor | None]


def is_sharded(path: Any) -> bool:
    """Whether there is a sharded checkpoint at `path`, ours or Lightning's."""
    return isinstance(path, str | os.PathLike) and os.path.isfile(os.path.join(os.fspath(path), DCP_INDEX))


# -- writing


def save(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], agree: Callable[[Any], Any], rank: int, several: bool
) -> None:
    """Write `checkpoint` from all processes at once; every one must call it.

    Args:
        checkpoint: with "state_dict", and "optimizer_states" by names (`slices.by_name`); DTensors in them are written
            in parts, each once. Everything else is the first process's.
        agree: gives what the first process gave it, in every process.
        rank: of this process.
        several: whether there is a process group.

    Raises:
        CheckpointError: in every process, where one could not write; nothing is at `path` that was not there before.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    rest = dict(checkpoint)
    parts: dict[str, Any] = {MODEL: rest.pop(MODEL)}
    for index, state in enumerate(rest.pop("optimizer_states", [])):
        parts[f"optimizer_{index}"] = state
    temporary, problem, lock = "", None, None
    if rank == 0:
        try:
            temporary, lock = temporaries.create_directory(io.local_path(path))
        except Exception as error:
            problem = f"the checkpoint {os.fspath(path)!r} could not be written: {error}"
    target, temporary, problem = agree((os.fspath(path), temporary, problem))
    if problem is not None:
        raise CheckpointError(problem)
    mine: dict[str, tuple[int, int]] = {}
    try:
        writer = FileSystemWriter(temporary, sync_files=True)
        state_dict_saver.save(parts, storage_writer=writer, no_dist=not several)
        mine = {name: _checksum(os.path.join(temporary, name)) for name in os.listdir(temporary)
                if name.startswith(f"__{rank}_") or (rank == 0 and name == DCP_INDEX)}  # fmt: skip
        if rank == 0:
            io.save(rest, os.path.join(temporary, META))
            mine[META] = _checksum(os.path.join(temporary, META))
    except Exception as error:
        problem = f"{type(error).__name__}: {io.first_line(error)}"
    files: list[Any] = [(mine, problem)]
    if several:
        files = [None] * dist.get_world_size()
        dist.all_gather_object(files, (mine, problem))
    problems = [f"process {number}: {said}" for number, (_, said) in enumerate(files) if said is not None]
    if not problems and rank == 0:
        try:
            _publish({name: of for held, _ in files for name, of in held.items()}, temporary, target)
        except Exception as error:
            problems = [f"process 0: {error}"]
    if rank == 0 and problems:
        with suppress(OSError):
            remove(temporary)
    if lock is not None:
        os.close(lock)
    problems = agree(problems)
    if problems:
        raise CheckpointError(
            f"the sharded checkpoint {target!r} could not be written ({'; '.join(problems[:3])}); what was there "
            f"before is whole. All processes must be able to write to one common directory."
        )


def _publish(files: dict[str, tuple[int, int]], temporary: str, target: str) -> None:
    mark = os.path.join(temporary, COMMIT)
    with open(mark, "w", encoding="utf-8") as file:
        json.dump({"format": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporaries.sync_directory(temporary)
    directory = os.path.dirname(os.path.abspath(target))
    if os.path.lexists(target):
        if _exchange(temporary, target):
            temporaries.sync_directory(directory)
            remove(temporary)
            return
        aside = f"{temporary}-old"
        os.rename(target, aside)
        os.rename(temporary, target)
        temporaries.sync_directory(directory)
        remove(aside)
        return
    os.rename(temporary, target)
    temporaries.sync_directory(directory)


def _exchange(a: str, b: str) -> bool:
    """Let two names change places in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE (linux/fs.h)
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _checksum(path: str) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return size, crc


# -- reading


def check(path: str, share: tuple[int, int] = (0, 1)) -> None:
    """Compare every file with what was committed; of the checksums only this process's share, (rank, world size).

    Raises:
        CheckpointError: the directory is not whole, or damaged.
    """
    for name in (DCP_INDEX, META):
        if not os.path.isfile(os.path.join(path, name)):
            raise CheckpointError(
                f"the sharded checkpoint {path!r} is not whole: {name} is missing; take an earlier one"
            )
    mark = os.path.join(path, COMMIT)
    if not os.path.exists(mark):
        return  # Lightning's have none
    try:
        with open(mark, encoding="utf-8") as file:
            files = json.load(file)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the sharded checkpoint {path!r} is damaged: {COMMIT}: {error}") from error
    for number, (name, (size, crc)) in enumerate(sorted(files.items())):
        held = os.path.join(path, name)
        there = os.path.getsize(held) if os.path.exists(held) else None
        mine = number % share[1] == share[0]
        if there != size or (mine and _checksum(held) != (size, crc)):
            what = "is missing" if there is None else f"has {there} bytes of {size}" if there != size else "is damaged"
            raise CheckpointError(f"the sharded checkpoint {path!r} is not whole: {name} {what}; take an earlier one")


def meta(path: str | os.PathLike[str], weights_only: bool = True) -> dict[str, Any]:
    """Everything but the model and the optimizers, unread: each of these is None in there."""
    held = io.load(os.path.join(os.fspath(path), META), weights_only=weights_only)
    tops = {key.partition(".")[0] for key in _index(os.fspath(path)).state_dict_metadata}
    held[MODEL] = None
    count = sum(_OPTIMIZER.match(top) is not None for top in tops)
    if count or "lr_schedulers" in held:
        held["optimizer_states"] = [None] * count
    return held


def load(
    path: str | os.PathLike[str],
    weights_only: bool = True,
    like: Like | None = None,
    optimizers: bool = True,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """The checkpoint as a file would give it: "state_dict", "optimizer_states" by numbers, and all other keys.

    Args:
        weights_only: build only tensors, containers, numbers and strings.
        like: the parameter or buffer of that name: tensors are laid out as it is. None: all whole, in CPU memory.
        optimizers: read their states, too.
        share: (rank, world size), where several processes read, which share the work of checking.

    Raises:
        CheckpointError: it is not whole, damaged, or no checkpoint of a Trainer's.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

    from lit_fast.checkpoint.slices import by_number, empty_part

    path = os.fspath(path)
    check(path, share)
    held = meta(path, weights_only)
    index = _index(path, weights_only)
    flat: dict[str, Any] = {}
    for key, item in index.state_dict_metadata.items():
        place = index.planner_data[key]
        top, optimizer = place[0], _OPTIMIZER.match(str(place[0]))
        if top not in _MODEL_KEYS and not (optimizer and optimizers):
            continue
        if not hasattr(item, "size"):  # bytes
            flat[key] = None
            continue
        name = ".".join(map(str, place[1:])) if optimizer is None else str(place[2])
        model = None if like is None else like(name)
        fits = model is not None and model.shape == item.size
        flat[key] = empty_part(
            item.size, item.properties.dtype, model if fits and model is not None else torch.empty(0)
        )
    try:
        reader = _reader(path, weights_only)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant: nothing is sent
            state_dict_loader.load(flat, storage_reader=reader, planner=_planner(weights_only), no_dist=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch answers damaged files with nearly any exception
        raise CheckpointError(f"cannot read the sharded checkpoint {path!r}: {io.first_line(error)}") from error
    nested = unflatten_state_dict(flat, {key: index.planner_data[key] for key in flat})
    held[MODEL] = next(nested[key] for key in _MODEL_KEYS if key in nested)
    if optimizers and "optimizer_states" in held:
        held["optimizer_states"] = [by_number(nested[f"optimizer_{i}"]) for i in range(len(held["optimizer_states"]))]
    elif not optimizers:
        held.pop("optimizer_states", None)
    return held


def consolidate(path: str | os.PathLike[str], output: str | os.PathLike[str], weights_only: bool = True) -> None:
    """Write the sharded checkpoint at `path` as one file that every strategy loads, and Lightning."""
    if not is_sharded(path):
        raise CheckpointError(f"{os.fspath(path)!r} is no sharded checkpoint: there is no {DCP_INDEX} in it.")
    io.save(load(path, weights_only), output)


# What a `.metadata` file is made of; it is a pickle, and nothing else in it is built.
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "builtins": ("set", "frozenset"),
    "collections": ("OrderedDict",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _INDEX_CLASSES.get(module, ())
        if (
            allowed is None
            or name in allowed
            or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype))
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds pickled code: {module}.{name}")


def _index(path: str, weights_only: bool = True) -> Any:
    try:
        with open(os.path.join(path, DCP_INDEX), "rb") as file:
            return (_IndexUnpickler if weights_only else pickle.Unpickler)(file).load()
    except Exception as error:
        raise CheckpointError(
            f"cannot read the sharded checkpoint {path!r}: {DCP_INDEX}: {io.first_line(error)}"
        ) from error


def _reader(path: str, weights_only: bool) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index = _index(path, weights_only)
            index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
            return index

    return Reader(path)


def _planner(weights_only: bool) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            with torch.serialization.safe_globals(io.HARMLESS):
                self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=weights_only)

    return Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
