"""What programs ask of signatures, of frames and of classes that a text names."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from types import FrameType
from typing import Any

from lit_fast.hparams import HyperparametersMixin
from lit_fast.pytorch.functions import is_picklable


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Remove what cannot be pickled, with a warning for each."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        warnings.warn(f"{name!r} cannot be pickled and is left out of the hyperparameters.", stacklevel=2)
        del hparams[name]


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """The names that the class's `__init__` gives to the object, to `*args` and to `**kwargs`.

    >>> parse_class_init_keys(type("A", (), {"__init__": lambda self, a, *rest: None}))
    ('self', 'rest', None)
    """
    first, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    named = {parameter.kind: parameter.name for parameter in parameters}
    return first.name, named.get(inspect.Parameter.VAR_POSITIONAL), named.get(inspect.Parameter.VAR_KEYWORD)


def get_init_args(frame: FrameType) -> dict[str, Any]:
    """The arguments of the `__init__` that `frame` is in; none where it is not in a method that says `super()`."""
    local = inspect.getargvalues(frame).locals
    if "__class__" not in local:
        return {}
    cls = local["__class__"]
    this, rest, keywords = parse_class_init_keys(cls)
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in (this, rest, keywords)]
    return {name: local[name] for name in names} | (local.get(keywords, {}) if keywords else {})


def collect_init_args(
    frame: FrameType, path_args: list[dict[str, Any]], inside: bool = False, classes: tuple[type, ...] = ()
) -> list[dict[str, Any]]:
    """The arguments of every `__init__` that called one another, from `frame` outwards, the innermost first.

    Args:
        path_args: where they are appended.
        inside: whether `frame` is in an `__init__` already; if not, the first one outwards is looked for.
        classes: only of subclasses of these.
    """
    current: FrameType | None = frame
    while current is not None and current.f_back is not None:
        owner = current.f_locals.get("__class__")
        if isinstance(owner, type) and (not classes or issubclass(owner, classes)):
            path_args.append(get_init_args(current))
            inside = True
        elif inside:
            break
        current = current.f_back
    return path_args


def save_hyperparameters(
    obj: Any, *args: Any, ignore: Sequence[str] | str | None = None, frame: FrameType | None = None
) -> None:
    """`obj.save_hyperparameters(...)` as a function; see `LightningModule.save_hyperparameters`."""
    frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
    HyperparametersMixin.save_hyperparameters(obj, *args, ignore=ignore, frame=frame)


def is_param_in_hook_signature(
    hook_fx: Callable[..., Any], param: str, explicit: bool = False, min_args: int | None = None
) -> bool:
    """Whether a hook takes `param`.

    Args:
        explicit: it has to be named; otherwise `*args` takes it, too.
        min_args: this many arguments, of any name, are as good.
    """
    known = inspect.getfullargspec(inspect.unwrap(hook_fx))
    count = len(known.args) - (bool(known.args) and known.args[0] == "self")
    by_number = min_args is not None and count >= min_args
    return param in known.args or by_number or (not explicit and known.varargs is not None)


def instantiate_class(args: Any | tuple[Any, ...], init: dict[str, Any]) -> Any:
    """An object of the class that `init["class_path"]` names.

    Args:
        args: its positional argument, or a tuple of them.
        init: "class_path", and its keyword arguments in "init_args".

    Example:
        >>> instantiate_class(1, {"class_path": "fractions.Fraction", "init_args": {"denominator": 3}})
        Fraction(1, 3)
    """
    home, _, name = init["class_path"].rpartition(".")
    kind = getattr(importlib.import_module(home), name)
    return kind(*(args if isinstance(args, tuple) else (args,)), **init.get("init_args", {}))
