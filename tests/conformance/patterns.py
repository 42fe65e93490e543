"""What an answer must look like: JSON as it is, with patterns where values differ from model to model.

An object with the key `$` is a pattern; every other value must be equal, an object with exactly these keys.

    {"$": "any"}                                anything
    {"$": "string"}, "integer", "number", "boolean"
    {"$": "regex", "value": "..."}              a string that matches from end to end
    {"$": "vector", "unit": true}               numbers, of length 1 if `unit`; as many as `length`, if that is given
    {"$": "base64", "length": n}                n little-endian float32 numbers
    {"$": "close", "value": ..., "within": e}   a number, or the first numbers of a list
    {"$": "list", "of": pattern, "length": n}   a list; `descending` names a key whose values must not grow
    {"$": "object", "with": {...}}              an object with at least these keys
"""

from __future__ import annotations

import base64
import math
import re
import struct
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
}  # fmt: skip


def misfit(found: Any, pattern: Any, place: str = "answer") -> str | None:
    """Where and how an answer differs from its pattern; None = it does not."""
    if isinstance(pattern, dict) and "$" in pattern:
        return _PATTERNS.get(pattern["$"], _typed)(found, pattern, place)
    if isinstance(pattern, dict):
        if not isinstance(found, dict) or set(found) != set(pattern):
            keys = sorted(found) if isinstance(found, dict) else type(found).__name__
            return f"{place} has {keys}, expected the keys {sorted(pattern)}"
        return _first(misfit(found[key], value, f"{place}.{key}") for key, value in pattern.items())
    if isinstance(pattern, list):
        if not isinstance(found, list) or len(found) != len(pattern):
            size = len(found) if isinstance(found, list) else type(found).__name__
            return f"{place} has {size}, expected a list of {len(pattern)}"
        return _first(misfit(f, p, f"{place}[{i}]") for i, (f, p) in enumerate(zip(found, pattern, strict=True)))
    same = type(found) is type(pattern) and found == pattern
    return None if same else f"{place} is {found!r}, expected {pattern!r}"


def _first(found: Any) -> str | None:
    return next((message for message in found if message is not None), None)


def _typed(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    name = pattern["$"]
    kinds = _TYPES[name]
    fits = isinstance(found, kinds) and (name == "boolean" or not isinstance(found, bool))
    return None if fits else f"{place} is {found!r}, expected a {name}"


def _any(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    return None


def _regex(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    if isinstance(found, str) and re.fullmatch(pattern["value"], found, re.DOTALL):
        return None
    return f"{place} is {found!r}, expected a match of {pattern['value']!r}"


def _vector(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    if not isinstance(found, list) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in found):
        return f"{place} is no list of finite numbers: {found!r:.80}"
    if len(found) != pattern.get("length", len(found)) or not found:
        return f"{place} has {len(found)} numbers, expected {pattern.get('length', 'some')}"
    norm = math.sqrt(sum(x * x for x in found))
    if "unit" in pattern and (abs(norm - 1) < 1e-4) is not pattern["unit"]:
        return f"{place} has length {norm}, expected {'1' if pattern['unit'] else 'another than 1'}"
    return None


def _base64(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    if not isinstance(found, str):
        return f"{place} is {found!r:.80}, expected base64"
    data = base64.b64decode(found, validate=True)
    return _vector(list(struct.unpack(f"<{len(data) // 4}f", data)), pattern, place)


def _close(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    wanted, within = pattern["value"], pattern.get("within", 1e-4)
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) < len(wanted):
            return f"{place} is {found!r:.80}, expected a list that begins with {wanted}"
        return _first(
            _close(number, {"value": goal, "within": within}, f"{place}[{i}]")
            for i, (number, goal) in enumerate(zip(found, wanted, strict=False))
        )
    fits = isinstance(found, (int, float)) and abs(found - wanted) <= within
    return None if fits else f"{place} is {found!r}, expected {wanted} within {within}"


def _list(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    if not isinstance(found, list):
        return f"{place} is {found!r:.80}, expected a list"
    if len(found) != pattern.get("length", len(found)):
        return f"{place} has {len(found)} elements, expected {pattern['length']}"
    if key := pattern.get("descending"):
        values = [row[key] for row in found]
        if values != sorted(values, reverse=True):
            return f"{place} is not descending by {key}: {values}"
    return _first(misfit(f, pattern.get("of", {"$": "any"}), f"{place}[{i}]") for i, f in enumerate(found))


def _object(found: Any, pattern: dict[str, Any], place: str) -> str | None:
    if not isinstance(found, dict):
        return f"{place} is {found!r:.80}, expected an object"
    if missing := set(pattern["with"]) - set(found):
        return f"{place} lacks {sorted(missing)}; it has {sorted(found)}"
    return _first(misfit(found[key], value, f"{place}.{key}") for key, value in pattern["with"].items())


_PATTERNS = {
    "any": _any, "regex": _regex, "vector": _vector, "base64": _base64, "close": _close, "list": _list,
    "object": _object,
}  # fmt: skip
