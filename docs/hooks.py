"""What mkdocs does beyond Markdown: tables of the command line's options, read from the application itself."""

from __future__ import annotations

import re
from typing import Any

from typer.main import get_command

from fastbert.cli import app

_MARK = re.compile(r"^<!-- options: ([a-z]+) -->$", re.MULTILINE)
_CHOICES = re.compile(r"[\w+-]+(\|[\w+-]+)+")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`<!-- options: NAME -->` becomes the arguments and options of that command, panel by panel."""
    return _MARK.sub(lambda found: options(found[1]), markdown)


def options(command: str) -> str:
    """Tables of a command's arguments and options."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    panels: dict[str, list[str]] = {}
    for parameter in commands[command].params:
        if getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        names = [parameter.name] if argument else [*parameter.opts, *parameter.secondary_opts]
        panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else "Options")
        row = f"| {', '.join(f'`{name}`' for name in names)} | {_help(parameter)} |"
        panels.setdefault(panel, []).append(row)
    return "\n\n".join("\n".join([f"| {panel} | |", "|---|---|", *rows]) for panel, rows in panels.items())


def _help(parameter: Any) -> str:
    """The help text, with choices and default where it does not say them."""
    text = re.sub(r"([<*|])", r"\\\1", parameter.help or "")
    if _CHOICES.fullmatch(parameter.metavar or ""):
        text += f" One of {', '.join(f'`{choice}`' for choice in parameter.metavar.split('|'))}."
    if getattr(parameter, "show_default", False) and parameter.default not in (None, False, ""):
        text += f" Default: `{parameter.default}`."
    return text
