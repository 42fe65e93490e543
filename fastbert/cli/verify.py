"""`fastbert verify`: a model held against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastbert.cli.application import app, option
from fastbert.corpus import open_corpus
from fastbert.hub import resolve


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    against: Annotated[Path | None, option("Reference", "A saved one: needs no transformers.")] = None,
    save: Annotated[Path | None, option("Reference", "Save what transformers computed, for --against.")] = None,
    input: Annotated[Path | None, option("Reference", "Your own texts, one a line.", "--input", "-i")] = None,
    output: Annotated[Path | None, option("Output", "The certificate as JSON.", "--output", "-o")] = None,
    plot: Annotated[Path | None, option("Output", "Error by layer: a .png or .svg (needs matplotlib).")] = None,
    layers: Annotated[bool, option("Output", "Show every layer.", "--layers")] = False,
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
