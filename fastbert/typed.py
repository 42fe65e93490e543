"""Values from outside, checked against the type that they must have: fields of JSON objects, options of a run."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union

_NAMES = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false", NoneType: "None"}
_MOST = 2**63  # integers of this size fit no tensor


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: a class, a union, a `Literal`, a tuple, list or mapping with their elements.

    A bool is no number, an int is a float, a float is finite, an int fits 64 bits.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return any(is_a(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(is_a(k, parts[0]) and is_a(v, parts[1]) for k, v in value.items())
    if isinstance(origin, type):
        elements = parts[0] if parts else Any
        return isinstance(value, (list, tuple)) and isinstance(value, origin) and all(is_a(v, elements) for v in value)
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in (int, float) and (isinstance(value, bool) or (isinstance(value, int) and abs(value) >= _MOST)):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")
    return isinstance(value, kind)


def spell(kind: Any) -> str:
    """A type in the words of an error message."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(spell(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    return _NAMES.get(kind, str(kind).removeprefix("collections.abc.").removeprefix("<class '").removesuffix("'>"))


def field(values: Mapping[str, Any], name: str, kind: Any, default: Any, source: object) -> Any:
    """`values[name]`, or the default where it is absent or null.

    Args:
        values: a JSON object.
        name: its key.
        kind: the type that the value must have.
        default: returned unchecked.
        source: the file, for the error message.

    Raises:
        ValueError: a value of another type, naming file, key, value and type.
    """
    value = values.get(name)
    if value is None:
        return default
    if not is_a(value, kind):
        raise ValueError(f"{source}: {name} is {value!r:.80}; it must be {spell(kind)}")
    return value
