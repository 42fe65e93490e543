"""`fastbert embed`: texts to vectors."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fastbert.cli.application import app, option
from fastbert.corpus import READERS, WRITERS, Corpus, VectorFile, open_corpus
from fastbert.embed_corpus import embed_to_file, embed_to_stdout, embed_to_table
from fastbert.hub import DEFAULT_MODEL, resolve


@app.command()
def embed(
    ctx: typer.Context,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without them and --input, lines of stdin.")] = None,
    input: Annotated[
        str | None, option("Input", f"File: {' '.join(READERS)}; - is stdin, one text a line.", "--input", "-i")
    ] = None,
    column: Annotated[str, option("Input", "Column or key that holds the text.")] = "text",
    output: Annotated[
        str | None, option("Output", f"File: {' '.join(WRITERS)}; - is stdout, JSON lines.", "--output", "-o")
    ] = None,
    text: Annotated[bool, option("Output", "Keep texts beside vectors (not in .npy).", "--text/--no-text")] = True,
    resume: Annotated[bool, option("Output", "Continue an interrupted run.", "--resume")] = False,
    overwrite: Annotated[bool, option("Output", "Replace what exists.", "--overwrite")] = False,
    quiet: Annotated[bool, option("Output", "No progress bar, no summary.", "--quiet", "-q")] = False,
    model: Annotated[str, option("Model", "Folder or hub id.", "--model", "-m")] = DEFAULT_MODEL,
    dtype: Annotated[
        str | None,
        option(
            "Model", "auto, float32, bfloat16, float16 or float8 (GPU), int8 (CPU); default: float32, auto on a GPU."
        ),
    ] = None,
    max_seq_length: Annotated[int | None, option("Model", "Tokens a text; longer ones are cut.", min=1)] = None,
    prompt_name: Annotated[str | None, option("Model", "One of the model's prompts.")] = None,
    prompt: Annotated[str | None, option("Model", "Words to put before every text.")] = None,
    normalize: Annotated[bool, option("Vectors", "Scale to length 1.", "--normalize/--no-normalize")] = False,
    truncate_dim: Annotated[int | None, option("Vectors", "Keep so many leading features.", min=1)] = None,
    device: Annotated[str | None, option("Speed", "cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    threads: Annotated[int | None, option("Speed", "CPU threads.", min=1)] = None,
    batch_size: Annotated[int | None, option("Speed", "Texts a batch at most.", min=1)] = None,
    token_budget: Annotated[int | None, option("Speed", "Tokens a batch at most.", min=1)] = None,
    chunk_rows: Annotated[int, option("Speed", "Rows a part: what an interruption can lose.", min=1)] = 2048,
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

    from fastbert.embedder import Embedder
    from fastbert.engine.dtypes import resolve_device, resolve_dtype

    where = resolve_device(device)
    folder = resolve(model)
    if file is not None:
        # Threads, batch size and token budget are left out: they decide the speed, and may change between runs. Which
        # device and dtype a default means depends on the machine: rows of two would differ.
        settings = {
            "input": corpus.name, "column": column, "chunk_rows": chunk_rows, "model": model, "folder": str(folder),
            "dtype": resolve_dtype(dtype, where), "device": where.type, "max_seq_length": max_seq_length,
            "prompt_name": prompt_name, "prompt": prompt, "normalize": normalize, "truncate_dim": truncate_dim,
        }  # fmt: skip
        if file.begin(settings):
            typer.echo(f"{output} is complete: nothing was left to compute", err=True)
            return
    warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {message}", err=True)
    embedder = Embedder.from_pretrained(folder, dtype, where, threads, max_seq_length)
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
