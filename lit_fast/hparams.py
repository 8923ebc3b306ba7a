"""`save_hyperparameters` and `hparams`, shared by modules and data modules."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
import types
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lit_fast.errors import MisconfigurationException, MisconfigurationTypeError


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

    def __delattr__(self, key: str) -> None:
        if key not in self:
            raise AttributeError(f"no hyperparameter {key!r}")
        del self[key]

    def __repr__(self) -> str:
        """One line for each key, in alphabetical order."""
        rows = [(f'"{key}":', self[key]) for key in sorted(self, key=str)]
        width = max((len(str(key)) for key in self), default=0) + 3
        return "\n".join(f"{quoted:{width}s} {value}" for quoted, value in rows)


class HyperparametersMixin:
    """Gives a class `save_hyperparameters()`, `hparams` and `hparams_initial`."""

    __jit_unused_properties__: ClassVar = ["hparams", "hparams_initial"]

    _log_hyperparams = False
    if TYPE_CHECKING:  # TorchScript reads the annotations of a class, and knows none of these types
        _hparams: MutableMapping[str, Any]
        _hparams_initial: MutableMapping[str, Any]
        _hparams_name: str | None

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of the calling `__init__` in `self.hparams` and in every checkpoint.

        The arguments of subclasses whose `__init__` called this one are kept too, and win where names meet. The fields
        of a dataclass are its arguments. A second call adds to the first.

        Args:
            args: names of the arguments to keep, or one mapping / namespace of values; all arguments when left out.
            ignore: names to leave out, also of what an earlier call kept.
            frame: the frame whose arguments are meant; the caller's by default.
            logger: also send them to the loggers at the start of a fit.

        Raises:
            MisconfigurationException: a name in `args` is no argument of the calling `__init__`, or what was given
                is no mapping.

        Example::

            class Model(LightningModule):
                def __init__(self, width: int = 64):
                    super().__init__()
                    self.save_hyperparameters()
                    print(self.hparams.width)
        """
        self.__dict__["_log_hyperparams"] = logger
        if len(args) == 1 and not args[0]:
            return
        ignored = {ignore} if isinstance(ignore, str) else {name for name in ignore or () if isinstance(name, str)}
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        assert frame is not None
        given = {name: value for name, value in _arguments(self, frame).items() if name not in ignored}
        containers = [arg for arg in args if not isinstance(arg, str)]
        if len(containers) > 1:
            raise MisconfigurationException(
                f"save_hyperparameters was given {len(containers)} containers of values; allowed are argument names, "
                f"or one dict or Namespace of values: merge them."
            )
        if containers:
            values = _mapping(containers[0])
            self.__dict__["_hparams_name"] = next(
                (name for name, value in given.items() if value is containers[0]), None
            )
        else:
            unknown = [arg for arg in args if arg not in given]
            if unknown:
                raise MisconfigurationException(
                    f"save_hyperparameters: {unknown[0]!r} is no argument of {type(self).__name__}.__init__; "
                    f"there are: {', '.join(given)}."
                )
            values = {arg: given[arg] for arg in args} if args else given
            self.__dict__["_hparams_name"] = "kwargs" if values else None
        self._set_hparams(values)
        self.remove_ignored_hparams(ignored)
        for name, value in self.hparams.items():
            if isinstance(value, torch.nn.Module):
                warnings.warn(
                    f"The hyperparameter {name!r} is a torch.nn.Module, whose weights every checkpoint holds anyway; "
                    f"leave it out: self.save_hyperparameters(ignore=[{name!r}]).",
                    stacklevel=2,
                )
        self.__dict__["_hparams_initial"] = copy.deepcopy(self.hparams)  # later changes of a list in it do not count

    def _set_hparams(self, values: Any) -> None:
        values = _mapping(values)
        if isinstance(values, dict) and isinstance(self.hparams, dict):
            self.hparams.update(values)
        else:  # a configuration object of another library is kept as it is
            self.__dict__["_hparams"] = values

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Forget these hyperparameters; a subclass drops so what its base class kept."""
        for name in ignore_list:
            self.hparams.pop(name, None)

    @property
    def hparams(self) -> Any:
        """The hyperparameters, as a dictionary that also reads by attribute; changes are kept."""
        return self.__dict__.setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> Any:
        """A copy of the hyperparameters as they were when `save_hyperparameters` was called."""
        return copy.deepcopy(self.__dict__.get("_hparams_initial", AttributeDict()))


def _mapping(values: Any) -> MutableMapping[str, Any]:
    if isinstance(values, Namespace):
        return dict(vars(values))
    if isinstance(values, Mapping) and not isinstance(values, MutableMapping):
        return dict(values)
    if isinstance(values, MutableMapping):
        return values
    raise MisconfigurationException(
        f"save_hyperparameters was given {type(values).__name__}; allowed are argument names, or one dict or Namespace "
        f"of values{', as dataclasses.asdict gives it' if dataclasses.is_dataclass(values) else ''}."
    )


def _arguments(owner: object, frame: types.FrameType) -> dict[str, Any]:
    """The arguments of the `__init__` that `frame` is in or was called from, and of the subclasses' that called it."""
    if dataclasses.is_dataclass(owner):
        return {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner) if field.init}
    current: types.FrameType | None = frame
    while current is not None and not _is_init_of(owner, current):  # a method that `__init__` called
        current = current.f_back
    collected: dict[str, Any] = {}
    while current is not None and _is_init_of(owner, current):
        collected.update(_frame_arguments(current))
        current = current.f_back
    return collected


def _is_init_of(owner: object, frame: types.FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "__init__" and code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is owner


def _frame_arguments(frame: types.FrameType) -> dict[str, Any]:
    code, local = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    values = {name: local[name] for name in code.co_varnames[1:count] if name in local}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        rest = code.co_varnames[count + bool(code.co_flags & inspect.CO_VARARGS)]
        values.update(local.get(rest, {}))
    return values


class NotPlain(Exception):
    """A hyperparameter that cannot be saved as data."""


def as_data(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters as values that load without executing code, and the names of those that cannot be.

    Numbers of numpy and enumerations of numbers or texts become numbers and texts; an AttributeDict becomes an
    OrderedDict, from which `as_given` makes an AttributeDict again.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in _container(hparams).items():
        try:
            kept[name] = _plain(value)
        except NotPlain:
            left_out.append(name)
    return kept, sorted(left_out)


def pickled(hparams: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What `as_data` left out, each value pickled into a uint8 tensor; and the names of those that cannot be."""
    kept: dict[str, torch.Tensor] = {}
    lost: list[str] = []
    values = _container(hparams)
    for name in names:
        try:
            kept[name] = torch.frombuffer(bytearray(pickle.dumps(values[name])), dtype=torch.uint8)
        except Exception:  # a lambda, a lock, an open file: classes refuse to be pickled with any exception
            lost.append(name)
    return kept, lost


def as_given(value: Any) -> Any:
    """What `as_data` made, as `save_hyperparameters` was given it."""
    if isinstance(value, dict):
        kind = AttributeDict if isinstance(value, OrderedDict) else dict
        return kind((key, as_given(item)) for key, item in value.items())
    return type(value)(map(as_given, value)) if type(value) in (list, tuple) else value


def _container(hparams: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration object of omegaconf as a dictionary, its references resolved; others as they are."""
    if type(hparams).__module__.partition(".")[0] != "omegaconf":
        return hparams
    from omegaconf import OmegaConf  # type: ignore[import-not-found,unused-ignore]

    resolved: dict[str, Any] = OmegaConf.to_container(hparams, resolve=True)
    return resolved


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size):
        return value
    if isinstance(value, torch.Tensor | PurePath):
        return value
    if isinstance(value, Enum) and isinstance(value, int | float | str):
        return _plain(value.value)
    if isinstance(value, int | float | complex | str | bytes):  # numpy's among them
        bases: tuple[Any, ...] = (int, float, complex, str, bytes)
        return next(base(value) for base in bases if isinstance(value, base))
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if kind in (list, tuple, set):
        return kind(map(_plain, value))
    if isinstance(value, Namespace) and kind is Namespace:
        return Namespace(**{key: _plain(item) for key, item in vars(value).items()})
    if kind in (dict, OrderedDict, AttributeDict):
        items = [(_plain(key), _plain(item)) for key, item in value.items()]
        return dict(items) if kind is dict else OrderedDict(items)
    if isinstance(_container(value), dict):
        return _plain(_container(value))
    raise NotPlain


if TYPE_CHECKING:
    class_only = classmethod
else:

    class class_only(classmethod):  # a decorator
        """A class method that cannot be called on an instance, whose state it would not change."""

        def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
            bound = super().__get__(instance, owner)
            if instance is None:
                return bound

            @functools.wraps(bound)
            def refused(*args: Any, **kwargs: Any) -> Any:
                kind = type(instance).__name__
                raise MisconfigurationTypeError(
                    f"{bound.__name__} was called on an instance; call {kind}.{bound.__name__}(...) on the class, and "
                    f"use what it returns."
                )

            return refused
