"""Profiles and reports as JSON files: written in pieces beside a run that goes on, and read as the same objects."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import Any

from lit_fast.errors import ProfileError
from lit_fast.profiler.record import Profile, Report

SCHEMA, VERSION = "lit_fast.profile", 1
PIECE = 1000  # characters of a file, or some more, that are made at a time: less than 0.1 ms


def to_json(value: Profile | Report) -> str:
    """With the schema's name and version; numbers that JSON has no word for are null."""
    return "".join(pieces(value))


def pieces(value: Profile | Report) -> Iterator[str]:
    """The text in pieces, a long list in several."""
    about = json.dumps({"schema": SCHEMA, "version": VERSION, "kind": type(value).__name__.lower()})
    piece = about[:-1]
    for each in dataclasses.fields(value):
        item = getattr(value, each.name)
        piece += f', "{each.name}": '
        if not isinstance(item, list):
            piece += _text(item)
        else:
            piece += "["
            for number, entry in enumerate(item):
                piece += f", {_text(entry)}" if number else _text(entry)
                if len(piece) >= PIECE:
                    yield piece
                    piece = ""
            piece += "]"
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    yield piece + "}"


def write(value: Profile | Report, path: str | os.PathLike[str], between: Callable[[], object] | None = None) -> None:
    """Whole or not at all: a reader never sees half of it, and a process killed here leaves the file before.

    `between` is called between any two pieces of it, so that other threads need not wait for all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w") as file:
            for piece in pieces(value):
                file.write(piece)
                if between is not None:
                    between()
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], without: Iterable[str] = ()) -> Profile | Report:
    """What `write` wrote.

    Args:
        path: the file.
        without: fields that are left as they are by default, for a reader of thousands of files who needs few of them.

    Raises:
        ProfileError: the file is not there, is no JSON, or no profile of a version that this release reads.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        held = Path(path).stat().st_size
        what = f"is not JSON, or only the beginning of it: {held:,} bytes ({error})" if held else "is empty"
        raise ProfileError(f"{path} {what}; a profile of lit_fast is wanted.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ProfileError(
            f"{path} is no profile of lit_fast: it has no 'schema': {SCHEMA!r}. StepProfiler(dirpath=...) and "
            f"`lit-fast profile` write one."
        )
    if data.get("version") != VERSION:
        raise ProfileError(
            f"{path} was written in version {data.get('version')} of the schema by {_release(data)}, and this release "
            f"reads version {VERSION}: record it again, or read it with the release that wrote it."
        )
    for name in without:
        data.pop(name, None)
    kind: Any = Report if data.get("kind") == "report" else Profile
    try:
        made: Profile | Report = _maker(kind)(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path} is damaged, or was edited: {type(error).__name__}: {error}.") from error
    return made


def _release(data: dict[str, Any]) -> str:
    header = data.get("header") or {}
    return f"lit_fast {(header.get('versions') or {}).get('lit_fast', 'of an unknown release')}"


def _text(value: Any) -> str:
    """JSON, straight from our objects: dictionaries of them would take ten times as long to make, in a running step."""
    kind: Any = type(value)
    return _writer(kind)(value)


@functools.cache
def _writer(kind: Any) -> Callable[[Any], str]:
    """What makes values of that type JSON, in the words that `json.dumps` uses."""
    if kind is type(None):
        return lambda value: "null"
    if dataclasses.is_dataclass(kind):
        names = [(f'"{field.name}": ', field.name) for field in dataclasses.fields(kind)]
        return lambda value: f"{{{', '.join([before + _text(getattr(value, name)) for before, name in names])}}}"
    if issubclass(kind, dict):
        return lambda value: f"{{{', '.join([f'{_quoted(str(k))}: {_text(v)}' for k, v in value.items()])}}}"
    if issubclass(kind, str):
        return _quoted
    if issubclass(kind, bool):
        return lambda value: "true" if value else "false"
    if issubclass(kind, float):
        return lambda value: float.__repr__(value) if math.isfinite(value) else "null"
    if issubclass(kind, int):
        return int.__repr__
    if issubclass(kind, Iterable):
        return lambda value: f"[{', '.join(map(_text, value))}]"
    raise TypeError(f"A profile holds no {kind.__name__}: numbers, words, lists, dictionaries, and what record.py has.")


@functools.cache  # looking at a type takes longer than reading an object of it, and files come by the thousand
def _maker(kind: Any) -> Callable[[Any], Any]:
    """A function from a value, as JSON has it, to an object of that type; fields that are unknown are left out."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        fields = {name: _maker(hint) for name, hint in typing.get_type_hints(kind).items()}
        make = typing.cast(Any, kind)

        def made(value: Any) -> Any:
            given = {name: fields[name](item) for name, item in value.items() if name in fields}
            return make(**{name: item for name, item in given.items() if item is not _ABSENT})

        return made
    if origin in (types.UnionType, typing.Union):
        inner = _maker(next(a for a in arguments if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    if origin is list:
        item_maker = _maker(arguments[0])
        return lambda value: [item_maker(item) for item in value]
    if origin is dict:
        key_maker, item_maker = arguments[0], _maker(arguments[1])
        return lambda value: {key_maker(key): item_maker(item) for key, item in value.items()}

    def plain(value: Any) -> Any:
        if type(value) is kind:
            return value
        if value is None:
            return _ABSENT  # a number that was not finite: the field's own default
        if kind is float and not isinstance(value, str):
            return float(value)
        raise TypeError(f"{value!r} is no {kind.__name__}")

    return plain


_ABSENT = object()
