"""`fastbert serve`: models over HTTP. Its options are the fields of `fastbert.serve.settings.Settings`."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastbert.cli.application import app, option, show_version
from fastbert.serve.settings import Settings


def _options() -> list[inspect.Parameter]:
    """One option for each setting, with its environment names: `FASTBERT_<NAME>`, then TEI's."""
    hints = typing.get_type_hints(Settings)
    return [_option(field, hints[field.name]) for field in dataclasses.fields(Settings)]


def _option(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    metadata = dict(field.metadata)
    panel, help, flags, env = (metadata.pop(key) for key in ("panel", "help", "flags", "env"))
    secret = metadata.pop("secret", False)
    own = "--" + field.name.replace("_", "-")
    if kind is bool and not flags:
        flags = (f"{own}/--no-{own[2:]}",)
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    default: Any = field.default
    if typing.get_origin(kind) is tuple:
        kind, default = list[str], list(default) or None
    elif typing.get_origin(kind) is types.UnionType:
        kind = parts[0] | None
    names = [f"FASTBERT_{field.name.upper()}", *env.split()]
    shown = option(
        panel, help, *(flags or (own,)), envvar=names, show_default=not secret, show_envvar=False, **metadata
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
    )


class _WithValues(TyperCommand):
    """`--auto-truncate true` and `--auto-truncate=false`, as text-embeddings-inference takes them, are flags too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        flags: list[str] = []
        for word in args:
            before = flags[-1:] == ["--auto-truncate"]
            value = word if before else word.removeprefix("--auto-truncate=")
            if value in ("true", "false") and (before or value != word):
                flags[len(flags) - before :] = ["--auto-truncate" if value == "true" else "--no-auto-truncate"]
            else:
                flags.append(word)
        return super().parse_args(ctx, flags)


def _unused(flag: str) -> Any:
    """An option of text-embeddings-inference that has nothing to set here."""
    return typer.Option(flag, hidden=True, envvar=flag[2:].replace("-", "_").upper())


def serve(
    model: Annotated[list[str] | None, typer.Argument(help="Folders or hub ids; the first is the default.")] = None,
    model_id: Annotated[
        str | None,
        option(
            "Model",
            "The same, as text-embeddings-inference names it.",
            "--model-id",
            envvar="MODEL_ID",
            show_envvar=False,
        ),
    ] = None,
    prometheus_port: Annotated[int | None, _unused("--prometheus-port")] = None,
    disable_spans: Annotated[bool, _unused("--disable-spans")] = False,
    uds_path: Annotated[str | None, _unused("--uds-path")] = None,
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=show_version, is_eager=True, hidden=True)
    ] = False,
    **given: Any,
) -> None:
    """Serve models over HTTP: the routes of text-embeddings-inference, OpenAI, Cohere and Jina.

    Every option can be set in the environment as FASTBERT_<NAME>; text-embeddings-inference's flags and
    environment names, all but HOSTNAME, work too.
    """
    models = [*(model or []), *([model_id] if model_id else [])]
    if not models:
        raise typer.BadParameter(
            "name a model: fastbert serve MODEL, for example sentence-transformers/all-MiniLM-L6-v2"
        )
    if stray := [name for name in models if name.lower() in ("true", "false")]:
        raise typer.BadParameter(
            f"{stray[0]!r} is no model; flags other than --auto-truncate take no value: --json-output, --no-json-output"
        )
    if twice := {name for name in models if models.count(name) > 1}:
        raise typer.BadParameter(f"{', '.join(sorted(twice))} is named twice: name each model once")
    for flag, value, why in (
        ("--prometheus-port", prometheus_port, "metrics are at /metrics of the server's own port"),
        ("--disable-spans", disable_spans, "there are no spans without --otlp-endpoint"),
        ("--uds-path", uds_path, "nothing here talks over a socket of its own; --unix-socket listens on one"),
    ):
        if value:
            typer.echo(f"{flag} does nothing: {why}", err=True)
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    settings = Settings(**values)
    keys = settings.keys()
    from fastbert.engine.dtypes import resolve_device
    from fastbert.hub import resolve

    resolve_device(settings.device)  # before anything is fetched
    try:
        from fastbert.serve.launch import launch
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; the server needs pip install 'fastbert-engine[serve]'") from error
    cache, token = settings.huggingface_hub_cache, settings.hf_token
    folders = [resolve(name, revision=settings.revision, cache_dir=cache, token=token) for name in models]
    raise typer.Exit(0 if launch(dict(zip(models, folders, strict=True)), settings, keys) else 1)


_own = inspect.signature(serve, eval_str=True)
_fixed = [parameter for parameter in _own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
serve.__signature__ = _own.replace(parameters=[*_fixed, *_options()])  # type: ignore[attr-defined]
app.command(cls=_WithValues, context_settings={"help_option_names": ["-h", "--help"]})(serve)
