"""Small file operations that leave either the old or the new state on disk, never a mixture."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, a symbolic link, or a directory tree; one that is gone already is no error."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.remove(path)


def link(target: str, path: str) -> None:
    """Make `path` a relative symbolic link to `target`, in one step; where links are not allowed, a copy."""
    if os.path.abspath(target) == os.path.abspath(path):
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    remove(temporary)
    try:
        os.symlink(os.path.relpath(target, os.path.dirname(path)), temporary)
    except OSError:  # Windows gives links only to privileged users
        (shutil.copytree if os.path.isdir(target) else shutil.copy2)(target, temporary)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)  # a directory cannot be replaced by a rename
    os.replace(temporary, path)
