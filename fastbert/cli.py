"""The command line: options and error messages. One function a command; what it does lies in the floors below.

Nothing here imports torch before a command needs it, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastbert.corpus import READERS, WRITERS, Corpus, CorpusError, VectorFile, open_corpus
from fastbert.embed_corpus import embed_to_file, embed_to_stdout, embed_to_table
from fastbert.hub import DEFAULT_MODEL, resolve


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


def _show_version(wanted: bool) -> None:
    if wanted:
        from fastbert import __version__

        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


@app.callback()
def fastbert(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """BERT-class encoders on packed batches, without padding."""


@app.command()
def embed(
    ctx: typer.Context,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without them and --input, lines of stdin.")] = None,
    input: Annotated[
        str | None, _option("Input", f"File: {' '.join(READERS)}; - is stdin, one text a line.", "--input", "-i")
    ] = None,
    column: Annotated[str, _option("Input", "Column or key that holds the text.")] = "text",
    output: Annotated[
        str | None, _option("Output", f"File: {' '.join(WRITERS)}; - is stdout, JSON lines.", "--output", "-o")
    ] = None,
    text: Annotated[bool, _option("Output", "Keep texts beside vectors (not in .npy).", "--text/--no-text")] = True,
    resume: Annotated[bool, _option("Output", "Continue an interrupted run.", "--resume")] = False,
    overwrite: Annotated[bool, _option("Output", "Replace what exists.", "--overwrite")] = False,
    quiet: Annotated[bool, _option("Output", "No progress bar, no summary.", "--quiet", "-q")] = False,
    model: Annotated[str, _option("Model", "Folder or hub id.", "--model", "-m")] = DEFAULT_MODEL,
    dtype: Annotated[str, _option("Model", "auto, float32, bfloat16, float16 (GPU) or int8 (CPU).")] = "auto",
    max_seq_length: Annotated[int | None, _option("Model", "Tokens a text; longer ones are cut.", min=1)] = None,
    prompt_name: Annotated[str | None, _option("Model", "One of the model's prompts.")] = None,
    prompt: Annotated[str | None, _option("Model", "Words to put before every text.")] = None,
    normalize: Annotated[bool, _option("Vectors", "Scale to length 1.", "--normalize/--no-normalize")] = False,
    truncate_dim: Annotated[int | None, _option("Vectors", "Keep so many leading features.", min=1)] = None,
    device: Annotated[str | None, _option("Speed", "cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    threads: Annotated[int | None, _option("Speed", "CPU threads.", min=1)] = None,
    batch_size: Annotated[int | None, _option("Speed", "Texts a batch at most.", min=1)] = None,
    token_budget: Annotated[int | None, _option("Speed", "Tokens a batch at most.", min=1)] = None,
    chunk_rows: Annotated[int, _option("Speed", "Rows a part: what an interruption can lose.", min=1)] = 2048,
) -> None:
    """Turn texts into vectors.

    Without --output the first rows are shown as a table. With it a file of any size is streamed.

    The same command with --resume continues an interrupted run.
    """
    if texts and input is not None:
        raise typer.BadParameter("give TEXTS or --input, not both")
    to_file = output is not None and output != "-"
    if (resume or overwrite) and not to_file:
        raise typer.BadParameter("--resume and --overwrite need --output FILE")
    if not texts and input is None and sys.stdin.isatty():
        typer.echo(ctx.get_help())
        raise typer.Exit(2)
    if texts:
        corpus = Corpus("the command line", iter(texts))
    else:
        corpus = open_corpus(None if input is None or input == "-" else Path(input), column)
    file = None
    if to_file:
        file = VectorFile(Path(str(output)), resume=resume, overwrite=overwrite, with_text=text)
    folder = resolve(model)
    if file is not None:
        # Threads, batch size and token budget are left out: they decide the speed, and may change between runs.
        settings = {
            "input": corpus.name, "column": column, "chunk_rows": chunk_rows, "model": model, "folder": str(folder),
            "dtype": dtype, "device": device, "max_seq_length": max_seq_length, "prompt_name": prompt_name,
            "prompt": prompt, "normalize": normalize, "truncate_dim": truncate_dim,
        }  # fmt: skip
        if file.begin(settings):
            typer.echo(f"{output} is complete: nothing was left to compute", err=True)
            return

    from fastbert.embedder import Embedder

    warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {message}", err=True)
    embedder = Embedder.from_pretrained(folder, dtype, device, threads, max_seq_length)
    encode = partial(
        embedder.encode_with_stats, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size,
        token_budget=token_budget, normalize_embeddings=normalize, truncate_dim=truncate_dim,
    )  # fmt: skip
    if file is not None:
        embed_to_file(corpus, file, encode, chunk_rows, quiet)
    elif output == "-":
        embed_to_stdout(corpus, encode, chunk_rows, text, quiet)
    else:
        embed_to_table(corpus, encode, quiet)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    against: Annotated[Path | None, _option("Reference", "A saved one: needs no transformers.")] = None,
    save: Annotated[Path | None, _option("Reference", "Save what transformers computed, for --against.")] = None,
    input: Annotated[Path | None, _option("Reference", "Your own texts, one a line.", "--input", "-i")] = None,
    output: Annotated[Path | None, _option("Output", "The certificate as JSON.", "--output", "-o")] = None,
    plot: Annotated[Path | None, _option("Output", "Error by layer: a .png or .svg (needs matplotlib).")] = None,
    layers: Annotated[bool, _option("Output", "Show every layer.", "--layers")] = False,
) -> None:
    """Hold a model against transformers in fp64, layer by layer; exit 1 past the budget."""
    if against is not None and (save is not None or input is not None):
        raise typer.BadParameter("--against brings its own texts and is saved already: leave out --input and --save")
    folder = resolve(model)

    from rich.console import Console

    from fastbert import verify as certify

    folder = certify.encoder_folder(folder)
    with Console(stderr=True).status("transformers, in fp64 and in each dtype") as line:
        if against is not None:
            reference = certify.Reference.load(against)
        else:
            texts = list(certify.TEXTS if input is None else open_corpus(input).texts)
            reference = certify.Reference.compute(folder, certify.token_ids(folder, texts))
        if save is not None:
            reference.save(save)
        lines = certify.verify(folder, reference, line.update)
    document = certify.certificate(model, reference, lines)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")
    if plot is not None:
        certify.plot(plot, model, lines)
    Console().print(certify.table(model, reference, lines, layers))
    raise typer.Exit(0 if document["passed"] else 1)
