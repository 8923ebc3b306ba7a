"""Checkpoint files that are either whole or not there.

`save` writes to a temporary name in the target's own directory (a rename is atomic only inside one
filesystem), syncs the file, renames it over the target and syncs the directory, so that a process killed, or
a machine losing power, at any moment leaves the previous file or the new one. `load` checks every byte before
anything is built from it.

Integrity rests on the CRC-32 that `torch.save` writes for every record of its zip archive, which `torch.load`
does not check (torch 2.13: a flipped bit in a tensor loads without a word). A digest of our own would protect
nothing more, and Lightning's files would not have it. Checking costs about 0.5 s per GB, where
`torch.load` itself takes 1.1 s and more (2 busy cores of an AMD Zen 3, zlib 1.2.13, file in the page cache).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import shutil
import threading
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any, cast

import torch

from lit_fast.checkpoint import temporaries
from lit_fast.errors import CheckpointError, CheckpointNotFoundError

PathLike = str | os.PathLike[str]

_CHUNK = 8 << 20  # bytes read at once while checking: small beside memory, large beside a system call
_LOCAL_HEADER = 30  # bytes of a zip entry's local header before its name (PKWARE APPNOTE 4.3.7)
_crc_option = threading.Lock()

# Classes that hyperparameters are often made of and that only hold data; each with the name that a file calls it by.
# Lightning's AttributeDict is read as an OrderedDict, the only mapping beside dict that torch fills without pickle.
_LIGHTNINGS = ("fabric.utilities.data", "pytorch.utilities.parsing")
HARMLESS: list[Any] = [
    Namespace,
    *((PurePath, f"pathlib.{name}") for name in ("PurePath", "PurePosixPath", "PureWindowsPath")),
    *((Path, f"pathlib.{name}") for name in ("PosixPath", "WindowsPath")),
    *((Path, f"pathlib._local.{name}") for name in ("PosixPath", "WindowsPath")),  # as Python 3.13 calls them
    *((OrderedDict, f"lightning.{home}.AttributeDict") for home in _LIGHTNINGS),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def save(payload: Mapping[str, Any], path: PathLike) -> None:
    """Write `payload` with `torch.save` so that `path` is at every moment the old file or the new one.

    A `path` that is a symbolic link is replaced itself; the file it points to is not touched. Temporaries
    left in the directory by killed processes are removed.

    Args:
        payload: What `load` gives back. Tensors, numbers, strings, None and containers of them load again
            with `weights_only=True`; a warning names every other class found.
        path: Target file. Missing parent directories are made.

    Raises:
        CheckpointError: Nothing was written (disk full, no permission, something that cannot be pickled). The
            temporary is removed, and a file that was at `path` before is whole.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/last.ckpt"
        >>> save({"epoch": 3, "state_dict": {"weight": torch.ones(2)}}, path)
        >>> load(path)["epoch"]
        3
    """
    target = local_path(path)
    if os.path.isdir(target) and not os.path.islink(target):
        raise CheckpointError(f"cannot write the checkpoint {target!r}: it is a directory; name a file in it")
    directory = os.path.dirname(target) or "."
    temporary: str | None = None
    sink: _Sink | None = None
    stage = "written"
    try:
        temporaries.make_directories(directory)
        temporary, fd = temporaries.create_file(directory, os.path.basename(target))
        sink = _Sink(fd)
        try:
            temporaries.sweep(directory, os.fstat(fd).st_mtime, keep=os.path.basename(temporary))
            with _checksums_on():
                torch.save(payload, cast(IO[bytes], sink))
            os.fsync(fd)
            foreign = unsafe_globals(temporary)
            os.replace(temporary, target)
            temporary, stage = None, "made durable (it is in place, but a power cut could still undo it)"
        finally:
            os.close(fd)
        temporaries.sync_directory(directory)
    except BaseException as raised:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        # torch's writer replaces the exception of a failed write by one of its own about a file position
        error = raised if sink is None or sink.error is None else sink.error
        if not isinstance(error, Exception):
            raise error from None
        raise CheckpointError(_why_not_saved(error, payload, target, directory, stage, sink)) from error
    if foreign:
        warnings.warn(
            f"the checkpoint {target!r} holds objects of {', '.join(foreign)}: it loads only with "
            "weights_only=False or after torch.serialization.add_safe_globals([...]); keep plain values and "
            "tensors in hyperparameters and in the state of callbacks to avoid this",
            stacklevel=2,
        )


def load(path: PathLike | IO[bytes], map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint written by `save`, by Lightning or by `torch.save`, after checking every byte of it.

    A sharded checkpoint, which is a directory, is read whole into CPU memory.

    Args:
        path: File to read, or directory; or an open file that can seek, which stays open.
        map_location: As for `torch.load`; the default puts every tensor into CPU memory.
        weights_only: True builds only tensors, containers, numbers, strings and allow-listed classes. False
            runs whatever code the file holds: only for a file whose maker one trusts. True narrows what a
            file can do; torch does not promise that it is a wall against a hostile one.

    Returns:
        The checkpoint's dict.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: A directory, truncated, damaged, not a checkpoint, or holding pickled code.

    Files in torch's format from before 1.6 and files written under
    `torch.serialization.set_crc32_options(False)` carry no checksums; they load unchecked.

    Example:
        >>> load("nowhere.ckpt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lit_fast.errors.CheckpointNotFoundError: there is no checkpoint 'nowhere.ckpt'; ...
    """
    if isinstance(path, str | os.PathLike):
        source, given = local_path(path), None
    else:
        source, given = str(getattr(path, "name", type(path).__name__)), path
    if given is None and os.path.isdir(source):
        from lit_fast.checkpoint import sharded

        if sharded.is_sharded(source):
            return sharded.load(source, weights_only)
    try:
        with contextlib.nullcontext(given) if given is not None else open(source, "rb") as file:
            _check_records(file, source)
            file.seek(0)
            with torch.serialization.safe_globals(HARMLESS):
                payload = torch.load(file, map_location=map_location, weights_only=weights_only)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"there is no checkpoint {source!r}; give the path of an existing file, or None to start anew"
        ) from error
    except IsADirectoryError as error:
        raise CheckpointError(
            f"the checkpoint {source!r} is a directory, and not a sharded checkpoint, in which there is a file "
            f"'.metadata'; give the path of a checkpoint"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {source!r}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_why_not_unpickled(source, weights_only, error)) from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except Exception as error:  # torch.load answers damaged and foreign files with nearly any exception
        device = "; is map_location right for this machine?" if map_location != "cpu" else ""
        raise CheckpointError(
            f"cannot read the checkpoint {source!r}: {type(error).__name__}: {first_line(error)}{device}"
        ) from error
    if not isinstance(payload, dict):
        raise CheckpointError(
            f"{source!r} is not a checkpoint: it holds a {type(payload).__name__}, not a dict; "
            "load such a file with torch.load and hand its contents to the module"
        )
    return payload


def unsafe_globals(path: PathLike) -> tuple[str, ...]:
    """Name, sorted, the classes and functions in the file `path` that `weights_only=True` refuses."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path))))
    except ValueError:  # torch's format from before 1.6: only an attempt to load it tells
        return ()


class _Sink:
    """A file descriptor as torch.save's target: writes the whole of each record, keeps the first error."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.written = 0  # bytes
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:
            raise self.error
        view = memoryview(data).cast("B")
        try:
            offset = 0
            while offset < len(view):  # Linux writes at most 2 GiB - 4 KiB in one call
                offset += os.write(self.fd, view[offset:])
        except BaseException as error:
            self.error = error
            raise
        self.written += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered here."""


def local_path(path: PathLike) -> str:
    name = os.fspath(path)
    if not name:
        raise CheckpointError(f"a checkpoint needs a file name, got {path!r}")
    if "://" in name:
        raise CheckpointError(f"the checkpoint {name!r} is remote; only local files are read and written")
    return name


@contextlib.contextmanager
def _checksums_on() -> Iterator[None]:
    """A user may have switched torch's record checksums off to save time; a checkpoint needs them."""
    with _crc_option:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(True)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


def _check_records(file: Any, source: str) -> None:
    """Compare every record with its checksum; raise CheckpointError at the first that differs."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        raise CheckpointError(f"the checkpoint {source!r} is empty (0 bytes); take an earlier one")
    magic = file.read(4)
    if magic != b"PK\x03\x04":
        # torch's oldest formats: a pickle (protocol 2) or a tar archive; they have no checksums
        if magic[:2] == b"\x80\x02":
            return
        raise CheckpointError(f"{source!r} is not a checkpoint: it does not begin like a file of torch.save")
    try:
        archive = zipfile.ZipFile(file)
        records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"the checkpoint {source!r} ({size} bytes) is truncated or damaged: its index cannot be read "
            f"({first_line(error)}); take an earlier one"
        ) from error
    if sum(record.file_size for record in records) > size or any(map(_is_foreign, records)):
        raise CheckpointError(
            f"{source!r} is damaged or not a checkpoint: torch.save neither compresses nor overlaps records, "
            "and writes no folders; take an earlier one"
        )
    if not any(record.CRC for record in records):
        return
    if len({record.filename for record in records}) < len(records):
        raise CheckpointError(f"the checkpoint {source!r} has two records of one name; take an earlier one")
    for record in records:
        if _crc32(file, record, size) != record.CRC:
            raise CheckpointError(
                f"the checkpoint {source!r} is damaged: record {record.filename!r} ({record.file_size} "
                "bytes) does not match its checksum; take an earlier one, and check this disk"
            )


def _is_foreign(record: zipfile.ZipInfo) -> bool:
    # 0x10 marks a folder (MS-DOS attribute): torch.load then leaves the tensor's memory uninitialised
    return bool(record.compress_type or record.external_attr & 0x10)


def _crc32(file: Any, record: zipfile.ZipInfo, size: int) -> int:
    """CRC-32 of a stored record; -1, which no checksum equals, where the record lies outside of the file."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        return -1
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    begin = record.header_offset + _LOCAL_HEADER + name_length + extra_length
    # the index has no checksum of its own: its names are checked against these second copies
    if begin + record.file_size > size or file.read(name_length) != record.orig_filename.encode():
        return -1
    file.seek(begin)
    crc, left = 0, record.file_size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            return -1
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return crc


def _why_not_unpickled(source: str, weights_only: bool, error: Exception) -> str:
    if not weights_only:
        return f"cannot read the checkpoint {source!r}: its pickled part is damaged ({first_line(error)})"
    try:
        foreign = ", ".join(unsafe_globals(source))
    except Exception:  # the file that just failed may fail here too; the first error is the one to tell
        foreign = ""
    if not foreign:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        foreign = match[1] if match else ""
    if not foreign:
        return (
            f"cannot read the checkpoint {source!r} with weights_only=True ({first_line(error)}); load it "
            "with weights_only=False only if you trust its maker, for that runs whatever code it holds"
        )
    return (
        f"the checkpoint {source!r} holds pickled code: {foreign}. Allowed are tensors, containers, numbers "
        "and strings. If you trust these classes, call torch.serialization.add_safe_globals([...]) with them "
        "first; weights_only=False runs whatever code the file holds, so use it only for a file whose maker "
        "you trust"
    )


def _why_not_saved(
    error: Exception, payload: Mapping[str, Any], target: str, directory: str, stage: str, sink: _Sink | None
) -> str:
    renamed = stage != "written"
    kept = "; the file that was there before is whole" if os.path.exists(target) and not renamed else ""
    if not isinstance(error, OSError):
        where = _unpicklable_keys(payload)
        if where:
            return (
                f"the checkpoint {target!r} could not be written: {where} cannot be pickled "
                f"({type(error).__name__}: {first_line(error)}); keep functions, locks, open files and the "
                f"like out of it{kept}"
            )
        reason = f"{type(error).__name__}: {first_line(error)}"
        return f"the checkpoint {target!r} could not be written: {reason}{kept}"
    cure = "see to the disk, or write to another directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = ""
        with contextlib.suppress(OSError):
            free = f", {shutil.disk_usage(directory).free / 1e6:.1f} MB are free"
        written = sink.written / 1e6 if sink is not None else 0.0
        cure = f"{written:.1f} MB were written{free}: make room, keep fewer checkpoints, or write elsewhere"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure = "make the directory writable, or write to another one"
    return f"the checkpoint {target!r} could not be {stage}: {error.strerror or error}; {cure}{kept}"


def _unpicklable_keys(payload: Mapping[str, Any]) -> str:
    class Nowhere:
        def write(self, data: Any) -> int:
            return len(data)

        def flush(self) -> None: ...

    guilty = []
    for key, value in payload.items():
        try:
            torch.save(value, cast(IO[bytes], Nowhere()))
        except Exception:  # whatever pickling this value raises, its key is the answer
            guilty.append(repr(key))
    return ", ".join(guilty)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]
