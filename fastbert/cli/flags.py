"""Flags out of a dataclass of options, and a TOML file below them: defaults, then --config, then flags.

A field is declared with `fastbert.train.options.option`; this file knows no field by its name.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union

from fastbert.cli.application import option
from fastbert.train.options import from_mapping, read_toml

CONFIG = option("Files", "A TOML file with options by the names of their flags; flags win over it.", "--config")


def with_flags(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each field of the dataclass `kind`, and --config.

    The command's own parameters come first, and those whose default is None may stand in the file, too. Its last one,
    `options`, gets the dataclass.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        leading = [p for name, p in own.parameters.items() if name != "options"]
        hints = typing.get_type_hints(kind)
        declared = [f for f in dataclasses.fields(kind) if "panel" in f.metadata]

        def run(**given: Any) -> None:
            config: Path | None = given.pop("config")
            flags = {f.name: given.pop(f.name) for f in declared}
            named = {name: _parse(text, hints[name]) for name, text in flags.items() if text is not None}
            content = {} if config is None else {k.replace("-", "_"): v for k, v in read_toml(config).items()}
            own_names = [p.name for p in leading if p.default is None]
            for name in own_names:
                if name in content:
                    value = content.pop(name)
                    given[name] = value if given[name] is None else given[name]
            if config is not None:
                from_mapping(kind, content, str(config), own_names)  # an error in the file is said to be there
            command(**given, options=from_mapping(kind, {**content, **named}, "the command line"))

        parameters = [*leading, _parameter("config", Path, CONFIG)]
        parameters += [_parameter(f.name, *_flag(f, hints[f.name])) for f in declared]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(name: str, kind: Any, flag: Any) -> inspect.Parameter:
    """None = not given, so that the file's value or the default counts."""
    annotation = Annotated[kind | None, flag]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(field: dataclasses.Field[Any], kind: Any) -> tuple[Any, Any]:
    """(type, typer option) of a field's flag."""
    own, metadata, kinds = "--" + field.name.replace("_", "-"), field.metadata, _kinds(kind)
    help = metadata["help"]
    if field.default not in (None, False):
        help = f"{help.removesuffix('.')} ({field.default})."
    if kinds == [bool]:
        return bool, option(metadata["panel"], help, f"{own}/--no-{own[2:]}", show_default=False)
    simple = kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, str) else str
    choices = [choice for part in kinds for choice in _choices(part)]
    more = {"metavar": "|".join(choices)} if choices else {}
    return simple, option(metadata["panel"], help, own, *metadata["names"], show_default=False, **more)


def _kinds(kind: Any) -> list[Any]:
    """The parts of a union without None."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (Union, UnionType) else (kind,)
    return [part for part in parts if part is not type(None)]


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(value) for value in typing.get_args(kind)]
    return ["true", "false"] if kind is bool else []


def _parse(value: Any, kind: Any) -> Any:
    """A flag's text as one of the field's types; what fits none is left for the dataclass to refuse."""
    if not isinstance(value, str):
        return value
    for part in _kinds(kind):
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        try:
            if part is bool and value in ("true", "false"):
                return value == "true"
            if part is str or (origin is Literal and value in arguments):
                return value
            if origin is tuple:
                return tuple(arguments[0](text.strip()) for text in value.split(","))
            if part in (int, float):
                return part(value)
        except ValueError:
            continue
    return value
