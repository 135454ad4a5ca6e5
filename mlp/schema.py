"""JSON as dataclasses, where every value is checked against the type of its field.

The files of a run folder may be cut, edited or made by someone else. So a wrong type is an error
here, with the name of the file and of the field, and not later at its first use.
"""

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class CheckpointError(ValueError):
    """A file is damaged or is no checkpoint. The message is one line."""


def typed(kind: type[T], value: Any, where: str) -> T:
    """A value of json.loads as a `kind`.

    kind: a dataclass, a plain type, or tuples, lists, dicts and unions of these. where: the place
    that an error names. CheckpointError for another type, and for a missing or an unknown field.
    """
    return _read(kind, value, where)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        return _union(kind, arguments, value, where)
    if origin is tuple:
        return _tuple(kind, arguments, value, where)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if (origin or kind) is dict and isinstance(value, dict):
        inner = arguments[1] if arguments else Any
        return {key: _read(inner, item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is kind:
        return value
    raise CheckpointError(f"{where} must be {_words(kind)}, got {_short(value)}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be an object with named fields, got {_short(value)}")
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            raise CheckpointError(
                f"{where} has an unknown field {_short(name)}; known: {', '.join(fields)}"
            )
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in value and not has_default:
            raise CheckpointError(f"{where} lacks the field {name}")
    read = {name: _read(hints[name], v, f"{where}: {name}") for name, v in value.items()}
    try:
        return kind(**read)
    except ValueError as error:  # from a dataclass that checks its values
        raise CheckpointError(f"{where}: {error}") from None


def _union(kind: Any, arguments: tuple, value: Any, where: str) -> Any:
    for argument in arguments:
        if argument is type(None):
            if value is None:
                return None
            continue
        if dataclasses.is_dataclass(argument) and isinstance(value, dict):
            return _dataclass(argument, value, where)  # its error names the field
        try:
            return _read(argument, value, where)
        except CheckpointError:
            pass
    raise CheckpointError(f"{where} must be {_words(kind)}, got {_short(value)}")


def _tuple(kind: Any, arguments: tuple, value: Any, where: str) -> tuple:
    repeated = len(arguments) == 2 and arguments[1] is Ellipsis
    if not isinstance(value, list) or not (repeated or len(value) == len(arguments)):
        raise CheckpointError(f"{where} must be {_words(kind)}, got {_short(value)}")
    kinds = [arguments[0]] * len(value) if repeated else arguments
    return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value)))


def _words(kind: Any) -> str:
    """A type in plain words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _words(a) for a in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}, each {_words(arguments[0])}"
    if origin in (tuple, list):
        return f"a list, each {_words(arguments[0])}"
    if (origin or kind) is dict or dataclasses.is_dataclass(kind):
        return "an object with named fields"
    return _WORDS[kind]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
