"""A callback made of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_fast.callbacks.callback import HOOK_NAMES, Callback
from lit_fast.errors import MisconfigurationTypeError


class LambdaCallback(Callback):
    """Takes any hook of `Callback` as a keyword argument: a function of that hook's arguments without `self`.

    Raises:
        MisconfigurationTypeError: a name that is no hook.

    Example::

        Trainer(callbacks=[LambdaCallback(on_train_epoch_end=lambda trainer, module:
        print(trainer.current_epoch))])
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        unknown = sorted(set(hooks) - set(HOOK_NAMES))
        if unknown:
            raise MisconfigurationTypeError(
                f"LambdaCallback({unknown[0]}=...) names no hook; hooks are: {', '.join(sorted(HOOK_NAMES))}."
            )
        for name, function in hooks.items():
            if function is not None:
                setattr(self, name, function)
