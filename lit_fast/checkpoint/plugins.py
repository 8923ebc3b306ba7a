"""Who writes, reads and removes checkpoint files: plugins for `Trainer(plugins=[...])`, under Lightning's names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from lit_fast.checkpoint import io
from lit_fast.checkpoint.files import remove
from lit_fast.errors import MisconfigurationException


class CheckpointIO(ABC):
    """Base of every plugin that keeps checkpoints somewhere or somehow else; the Trainer calls nothing but these.

    Example::

        class Compressed(CheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None): ...
            def load_checkpoint(self, path, map_location=None, weights_only=None): ...
            def remove_checkpoint(self, path): ...

        Trainer(plugins=[Compressed()])
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint`, which hooks have completed, to `path`; `storage_options` is the caller's, unchanged."""

    @abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Give back what `save_checkpoint` was given; None as `weights_only` is the default of the plugin."""

    @abstractmethod
    def remove_checkpoint(self, path: Any) -> None:
        """Remove the checkpoint; one that is gone already is no error."""

    def teardown(self) -> None:  # noqa: B027  (most plugins have nothing to do there)
        """Called at the end of every run, whole or broken off."""


class TorchCheckpointIO(CheckpointIO):
    """Local files in torch's format, written whole or not at all and checked when read: see `checkpoint/io.py`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise MisconfigurationException(
                f"save_checkpoint(storage_options={storage_options!r}): {type(self).__name__} writes local files and "
                f"has no options; leave it out, or pass Trainer(plugins=[...]) a CheckpointIO of yours that takes them."
            )
        io.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return io.load(path, map_location or "cpu", weights_only is not False)

    def remove_checkpoint(self, path: Any) -> None:
        remove(path)


class WrappingCheckpointIO(CheckpointIO):
    """Does something around another plugin, which it hands everything on to.

    Args:
        checkpoint_io: the plugin inside; left out, the Trainer sets its own.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self.checkpoint_io: CheckpointIO | None = checkpoint_io

    @property
    def _inner(self) -> CheckpointIO:
        if self.checkpoint_io is None:
            self.checkpoint_io = TorchCheckpointIO()
        return self.checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._inner.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self._inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self._inner.teardown()


class AsyncCheckpointIO(WrappingCheckpointIO):
    """Copies the checkpoint in memory and writes it in a thread, one after another, while training goes on.

    An error of a write is raised by the next call, `teardown` at the latest.

    Args:
        checkpoint_io: the plugin that writes; left out, `TorchCheckpointIO`.

    Example::

        Trainer(plugins=[AsyncCheckpointIO()])
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # training writes into the very tensors that are being saved
        self._later(self._inner.save_checkpoint, _copied(checkpoint), path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._raise_errors(wait=True)
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self._later(self._inner.remove_checkpoint, path)  # in its turn: the new file is written before the old one goes

    def teardown(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
        self._raise_errors(wait=True)
        super().teardown()

    def _later(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._raise_errors(wait=False)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="lit-fast-checkpoint")
        self._pending.append(self._thread.submit(function, *args, **kwargs))

    def _raise_errors(self, wait: bool) -> None:
        finished = [future for future in self._pending if wait or future.done()]
        self._pending = [future for future in self._pending if future not in finished]
        for future in finished:
            future.result()


def _copied(value: Any) -> Any:
    """The same containers with copies of the tensors in them; a tensor that stands at two places stays one."""
    copies: dict[Any, torch.Tensor] = {}

    def copy(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            place = (item.data_ptr(), item.shape, item.stride(), item.dtype, item.device)
            return copies[place] if place in copies else copies.setdefault(place, item.detach().clone())
        if isinstance(item, dict):
            made = item.copy()  # keeps the class and attributes of a state_dict
            for key, inner in item.items():
                made[key] = copy(inner)
            return made
        if type(item) in (list, tuple):
            return type(item)(map(copy, item))
        return item

    return copy(value)


def split_plugins(plugins: Any) -> tuple[CheckpointIO | None, list[Any]]:
    """The plugin for checkpoints among those given (None, one, or a list), and the others.

    Raises:
        MisconfigurationException: there is more than one.
    """
    given = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    mine = [plugin for plugin in given if isinstance(plugin, CheckpointIO)]
    if len(mine) > 1:
        names = ", ".join(type(plugin).__name__ for plugin in mine)
        raise MisconfigurationException(f"Trainer(plugins=...) was given {len(mine)} CheckpointIO ({names}); pass one.")
    return (mine[0] if mine else None), [plugin for plugin in given if not isinstance(plugin, CheckpointIO)]
