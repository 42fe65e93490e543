"""Dataclasses of options: how a field is declared, checked, and read from TOML.

A field carries its help text, the panel of `--help` it belongs to and further names of its flag as metadata, so that a
library call, a file and a command know the same options.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastbert.typed import is_a, spell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

D = TypeVar("D")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def option(default: Any, panel: str, help: str, *names: str) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its default.
        panel: heading under which `--help` shows it.
        help: one line.
        names: flags that mean the same as the field's own, such as `--lr`.
    """
    return dataclasses.field(default=default, metadata={"panel": panel, "help": help, "names": names})


def parse_seconds(value: str | float) -> float:
    """Seconds of a duration: a number, or one with a unit such as 90s, 10m, 1.5h, 1d.

    Raises:
        ValueError: anything else, or not above 0.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smhd]?)", str(value).strip())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{value!r} is no duration: write seconds, or a number with a unit, such as 90s, 10m or 2h")
    return seconds


def check_types(options: Any) -> None:
    """Raise ValueError for a field of a dataclass whose value is not of the field's type."""
    for name, kind in typing.get_type_hints(type(options)).items():
        value = getattr(options, name, None)
        if not is_a(value, kind):
            raise ValueError(f"{name} is {value!r}; it must be {spell(kind)}")


def from_mapping(kind: type[D], values: Mapping[str, Any], source: str, also: Iterable[str] = ()) -> D:
    """A dataclass of options from names and values, such as a TOML file's.

    Args:
        kind: the dataclass.
        values: by field name; `-` in a name is read as `_`, a list as a tuple.
        source: what error messages call the place they come from.
        also: names that the caller took out of `values`, for the message.

    Raises:
        ValueError: a name that no field has (with all that there are), or what the dataclass refuses.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = {field.name for field in fields}
    short = {n.lstrip("-").replace("-", "_"): f.name for f in fields for n in f.metadata.get("names", ())}
    named = {n.replace("-", "_"): tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    for name in values:
        if (plain := name.replace("-", "_")) not in known:
            from fastbert.weights import nearest  # loads torch, which --help must not wait for

            meant = f": write {short[plain]}" if plain in short else nearest(name, known)
            names = ", ".join(sorted({*known, *also}))
            raise ValueError(f"{source} sets {name!r}, which no option is called{meant}. The names are {names}")
    try:
        return kind(**named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not TOML, with the place of the error.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
