"""`fastbert finetune`: a checkpoint and labelled examples to a trained model."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from fastbert.cli.application import app, option
from fastbert.cli.flags import with_flags
from fastbert.hub import DEFAULT_MODEL
from fastbert.train.finetune_arguments import TASK_NAMES, FinetuneArguments


@app.command()
@with_flags(FinetuneArguments)
def finetune(
    task: Annotated[str, typer.Argument(help=f"{', '.join(TASK_NAMES)}.")],
    train: Annotated[str | None, option("Files", "Training data: .csv .tsv .jsonl .json .parquet .conll.")] = None,
    eval: Annotated[str | None, option("Files", "Evaluation data.")] = None,
    model: Annotated[
        str | None, option("Files", f"Folder or hub id to start from ({DEFAULT_MODEL}).", "--model", "-m")
    ] = None,
    dry_run: Annotated[bool, option("Files", "Say what would be done, and stop.", "--dry-run")] = False,
    *,
    options: FinetuneArguments,
) -> None:
    """Fine-tune a model: fastbert finetune classification --train t.csv --eval e.csv --out OUT

    OUT then holds the model, its tokenizer, metrics.json, the log with its curves, a model card and checkpoints.

    The same command with --resume continues an interrupted run.
    """
    if train is None:
        raise typer.BadParameter("--train FILE is needed: the labelled examples")
    if options.output_dir is None and not dry_run:
        raise typer.BadParameter("--out FOLDER is needed: the trained model goes there")
    if task not in TASK_NAMES:
        raise typer.BadParameter(f"unknown task {task!r}; the tasks are {', '.join(TASK_NAMES)}")

    from fastbert.engine.dtypes import resolve_device
    from fastbert.train.finetune import prepare

    resolve_device(options.device)  # before anything is read
    warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {message}", err=True)
    run: Any = prepare(model or DEFAULT_MODEL, train, eval, task, options)
    if dry_run:
        from rich.console import Console

        from fastbert.train.finetune_plan import plan_table

        Console(markup=False).print(plan_table(run))  # names may have brackets
        return
    run.run()
