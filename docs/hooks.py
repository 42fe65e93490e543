"""What mkdocs does beyond Markdown: tables of options and of dataclasses' fields, read from the code itself."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib import import_module
from typing import Any

from typer.main import get_command

from fastbert.cli import app
from fastbert.cli.bench import suite_root

_MARK = re.compile(r"^<!-- (options|fields): ([\w.]+) -->$", re.MULTILINE)
_CHOICES = re.compile(r"[\w+-]+(\|[\w+-]+)+")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`<!-- options: COMMAND -->` becomes a command's arguments and options, panel by panel; `<!-- fields: CLASS -->`
    the fields that a dataclass adds to those of its bases."""
    return _MARK.sub(lambda found: {"options": options, "fields": fields}[found[1]](found[2]), markdown)


def options(name: str) -> str:
    """Tables of a command's arguments and options."""
    panels: dict[str, list[str]] = {}
    for parameter in command(name).params:
        if getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        names = [parameter.name] if argument else [*parameter.opts, *parameter.secondary_opts]
        panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else "Options")
        row = f"| {', '.join(f'`{name}`' for name in names)} | {_help(parameter)} |"
        panels.setdefault(panel, []).append(row)
    return "\n\n".join("\n".join([f"| {panel} | |", "|---|---|", *rows]) for panel, rows in panels.items())


def command(name: str) -> Any:
    """A command of the application; that of the benchmark suite is declared there."""
    if name != "bench":
        return get_command(app).commands[name]  # type: ignore[attr-defined]
    sys.path.insert(0, str(suite_root()))
    return get_command(import_module("benchmarks.__main__").app)


def fields(path: str) -> str:
    """A table of a dataclass's own fields: type, default, and the help text where fields have one."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name)
    own = [f for f in dataclasses.fields(kind) if f.name in kind.__annotations__]
    helps = any("help" in f.metadata for f in own)
    rows = (
        ["| field | | default | type |", "|---|---|---|---|"]
        if helps
        else ["| field | default | type |", "|---|---|---|"]
    )
    for f in own:
        default = repr(f.default) if f.default_factory is dataclasses.MISSING else f"{f.default_factory.__name__}()"
        meaning = [_plain(f.metadata["help"])] if helps else []
        rows.append(f"| {' | '.join([f'`{f.name}`', *meaning, f'`{default}`', f'`{f.type}`'])} |")
    return "\n".join(rows)


def _plain(text: str) -> str:
    return re.sub(r"([<*|])", r"\\\1", text)


def _help(parameter: Any) -> str:
    """The help text, with choices and default where it does not say them."""
    text = _plain(parameter.help or "")
    if _CHOICES.fullmatch(parameter.metavar or ""):
        text += f" One of {', '.join(f'`{choice}`' for choice in parameter.metavar.split('|'))}."
    if getattr(parameter, "show_default", False) and parameter.default not in (None, False, ""):
        text += f" Default: `{parameter.default}`."
    return text
