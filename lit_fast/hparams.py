"""`save_hyperparameters` and `hparams`, shared by modules and data modules."""

from __future__ import annotations

import inspect
import types
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from lit_fast.errors import MisconfigurationException


class AttributeDict(dict[str, Any]):
    """A dictionary whose keys read and write as attributes too."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            known = ", ".join(map(str, self)) or "none"
            raise AttributeError(f"no hyperparameter {key!r}; there are: {known}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class HyperparametersMixin:
    """Gives a class `save_hyperparameters()`, `hparams` and `hparams_initial`."""

    _hparams: AttributeDict
    _hparams_initial: AttributeDict
    _hparams_name: str | None
    _log_hyperparams: bool

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of the calling `__init__` in `self.hparams` and in every checkpoint.

        Args:
            args: names of the arguments to keep, or one mapping / namespace of values; all arguments when left out.
            ignore: names to leave out.
            frame: the frame whose arguments are meant; the caller's by default.
            logger: also send them to the loggers at the start of a fit.

        Raises:
            MisconfigurationException: a name in `args` is no argument of the calling `__init__`.

        Example::

            class Model(LightningModule):
                def __init__(self, width: int = 64):
                    super().__init__()
                    self.save_hyperparameters()
                    print(self.hparams.width)
        """
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        assert frame is not None
        self._log_hyperparams = logger
        if len(args) == 1 and not isinstance(args[0], str):
            given = vars(args[0]) if isinstance(args[0], Namespace) else args[0]
            if not isinstance(given, Mapping):
                raise MisconfigurationException(
                    f"save_hyperparameters was given {type(given).__name__}; allowed are argument names, "
                    f"or one dict or Namespace of values."
                )
            values, name = dict(given), _argument_named(frame, args[0])
        else:
            values, name = _init_arguments(frame), "kwargs"
            unknown = [arg for arg in args if arg not in values]
            if unknown:
                raise MisconfigurationException(
                    f"save_hyperparameters: {unknown[0]!r} is no argument of {type(self).__name__}.__init__; "
                    f"there are: {', '.join(values)}."
                )
            if args:
                values = {arg: values[arg] for arg in args}
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        values = {key: value for key, value in values.items() if key not in ignored}
        self.__dict__.setdefault("_hparams", AttributeDict()).update(values)
        self.__dict__["_hparams_name"] = name
        self.__dict__["_hparams_initial"] = AttributeDict(self._hparams)

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters, as a dictionary that also reads by attribute; changes are kept."""
        kept: AttributeDict = self.__dict__.setdefault("_hparams", AttributeDict())
        return kept

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were when `save_hyperparameters` was called."""
        return AttributeDict(self.__dict__.get("_hparams_initial", {}))


def _init_arguments(frame: types.FrameType) -> dict[str, Any]:
    """The arguments of the calling `__init__` and of the subclasses' `__init__` that called it for the same object."""
    collected: dict[str, Any] = {}
    owner = _self_of(frame)
    current: types.FrameType | None = frame
    while current is not None and current.f_code.co_name == "__init__" and _self_of(current) is owner:
        collected = {**_frame_arguments(current), **collected}
        current = current.f_back
    return collected


def _self_of(frame: types.FrameType) -> Any:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _frame_arguments(frame: types.FrameType) -> dict[str, Any]:
    code, local = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    names = list(code.co_varnames[:count])
    values = {name: local[name] for name in names[1:] if name in local}
    if code.co_flags & inspect.CO_VARARGS:
        count += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        values.update(local.get(code.co_varnames[count], {}))
    return values


def _argument_named(frame: types.FrameType, value: Any) -> str:
    return next((name for name, local in frame.f_locals.items() if local is value), "kwargs")
