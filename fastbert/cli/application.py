"""The application: how errors are printed, `--version`, `--debug`, and how an option is declared."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from fastbert.corpus import CorpusError


class PlainErrors(TyperGroup):
    """Errors of every command as one message on stderr; exit 2 for bad input, 130 for Ctrl-C, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, MemoryError) as error:
            if ctx.params["debug"]:
                raise
            # str() of a KeyError is the repr of its message.
            message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
            typer.echo(f"error: {message or type(error).__name__}", err=True)
            raise typer.Exit(2 if isinstance(error, CorpusError) else 1) from error


app = typer.Typer(cls=PlainErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from fastbert import __version__

        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """An option of a command, in the panel of its help."""
    return typer.Option(*names, help=escape(help), rich_help_panel=panel, **more)  # [otel] is text, no style


@app.callback()
def fastbert(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """BERT-class encoders on packed batches, without padding."""
