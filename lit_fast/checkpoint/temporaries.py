"""Temporary names beside their target: made, locked, swept when their writer is dead; and directories made durable."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket

try:
    import fcntl
except ImportError:  # Windows: no flock, so temporaries are never swept there
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"^\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.lit-tmp$")
_OTHER_HOST_SECONDS = 86_400.0  # no write takes a day; only files of other hosts are judged by age


def make_directories(directory: str) -> None:
    """Make it and its parents, each durable in the one above."""
    missing = []
    while directory and not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for name in reversed(missing):
        os.makedirs(name, exist_ok=True)  # exist_ok: another process may make it at the same moment
        sync_directory(os.path.dirname(name) or ".")


def sync_directory(directory: str) -> None:
    """Make the names in it durable, where the filesystem can."""
    if os.name != "posix":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # filesystems that cannot sync a directory say so with these two; EIO and the like are real failures
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _name(directory: str, name: str) -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64] or "host"
    # 255 bytes is the longest file name of the usual filesystems
    stem = name.encode()[:120].decode(errors="ignore")
    return os.path.join(directory, f".{stem}.{host}.{os.getpid()}.{secrets.token_hex(4)}.lit-tmp")


def create_directory(target: str) -> tuple[str, int | None]:
    """Make and lock a directory beside `target`, and its parents; those of dead processes of this host are removed.

    Returns:
        Its path, and a descriptor that holds the lock until it is closed.
    """
    directory, name = os.path.split(os.path.abspath(target))
    make_directories(directory)
    if fcntl is None:
        path = _name(directory, name)
        os.mkdir(path)
        return path, None
    own = _TEMPORARY.match(os.path.basename(_name(directory, name)))
    for entry in os.scandir(directory):
        match = _TEMPORARY.match(entry.name)
        if match and own and match["host"] == own["host"] and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                fd = os.open(entry.path, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path)
                finally:
                    os.close(fd)
    path = _name(directory, name)
    os.mkdir(path)
    fd = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # no locks on this filesystem
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return path, fd


def create_file(directory: str, name: str) -> tuple[str, int]:
    """Make and lock a new file beside the target; the lock dies with the process: see `sweep`."""
    while True:
        path = _name(directory, name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileExistsError:
            continue
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # no locks on this filesystem: the process id must do
                    fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink > 0:  # a sweeper may have taken the file before the lock was ours
                return path, fd
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        os.close(fd)


def sweep(directory: str, now: float, keep: str) -> None:
    """Remove temporaries whose writer is dead. `now` is the filesystem's own clock, not this machine's."""
    if fcntl is None:
        return
    host = _TEMPORARY.match(keep)
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            match = _TEMPORARY.match(entry.name)
            if match is None or entry.name == keep:
                continue
            with contextlib.suppress(OSError):
                if host is not None and match["host"] == host["host"]:
                    _remove_if_abandoned(entry.path, int(match["pid"]))
                elif now - entry.stat().st_mtime > _OTHER_HOST_SECONDS:
                    os.unlink(entry.path)


def _remove_if_abandoned(path: str, pid: int) -> None:
    """A free lock decides; process ids repeat (in a container it is nearly always the same one).

    The file goes while the lock is held: whoever has made it and waits for the lock sees then that it is gone.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:  # no locks on this filesystem
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os.unlink(path)
        except PermissionError:
            pass
    else:
        os.unlink(path)
    finally:
        os.close(fd)
