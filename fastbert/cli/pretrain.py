"""`fastbert pretrain`: texts to a language model."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, Any

import typer

from fastbert.cli.application import app, option
from fastbert.cli.flags import with_flags
from fastbert.train.pretrain_arguments import PretrainArguments


@app.command()
@with_flags(PretrainArguments)
def pretrain(
    more_data: Annotated[list[str] | None, typer.Argument(help="More texts, as --data *.txt gives them.")] = None,
    dry_run: Annotated[
        bool, option("Files", "Say what would be done, and stop; tokens are made, and kept for the run.", "--dry-run")
    ] = False,
    *,
    options: PretrainArguments,
) -> None:
    """Pretrain a model: fastbert pretrain --data *.txt --vocab-size 30522 --size small --out OUT

    OUT then holds the model, its tokenizer, metrics.json, the log with its curves, a model card and checkpoints, and
    in data/ the vocabulary and the tokens, which the next run on the same texts uses again.

    The same command with --resume continues an interrupted run; --model OUT begins a second phase, for example with a
    longer --seq-length.
    """
    options = replace(options, data=(*options.data, *(more_data or ())))
    if not options.data:
        raise typer.BadParameter("--data FILES is needed: the texts to learn from")
    if options.output_dir is None:
        raise typer.BadParameter("--out FOLDER is needed: model, checkpoints and tokens go there")

    from fastbert.engine.dtypes import resolve_device
    from fastbert.train.pretrain import prepare

    resolve_device(options.device)  # before anything is read
    warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {message}", err=True)
    run: Any = prepare(options)
    if dry_run:
        from rich.console import Console

        from fastbert.train.pretrain_plan import plan_table

        Console(markup=False).print(plan_table(run))  # names may have brackets
        return
    run.run()
