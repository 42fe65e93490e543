"""What a fine-tuning run would do, as a table, without doing it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from rich.table import Table

from fastbert.train.batch import TrainBatch
from fastbert.train.distributed import World
from fastbert.train.examples import Examples
from fastbert.train.feed import loader_of
from fastbert.train.finetune import Finetuning, label_counts
from fastbert.train.schedule import total_steps

MAX_LABELS = 8


def plan_table(run: Finetuning) -> Table:
    """Data, model, steps, memory and an estimate of the time, two columns."""
    table = Table(title=f"{run.name}, {run.task.name}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for rows in (_data(run), _model(run), _steps(run)):
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()
    return table


def _data(run: Finetuning) -> Iterator[tuple[str, str]]:
    for kind, name, examples in zip(("train", "eval"), run.sources, (run.train, run.eval), strict=False):
        if examples is not None:
            yield kind, f"{name}: {len(examples):,} items, {int(examples.lengths.sum()):,} tokens"
            yield "", _lengths(examples)
            if told := _labels(run, examples):
                yield "", told


def _lengths(examples: Examples) -> str:
    middle, most, longest = np.percentile(examples.sequence_lengths, (50, 95, 100)).astype(int)
    told = f"lengths {middle} (median), {most} (95 %), {longest} (longest)"
    return told + (f"; {examples.num_truncated:,} are cut" if examples.num_truncated else "")


def _labels(run: Finetuning, examples: Examples) -> str:
    counts = label_counts(examples, run.model.config.id2label or {})
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:MAX_LABELS]]
    more = [f"{len(counts) - MAX_LABELS} more"] if len(counts) > MAX_LABELS else []
    return f"labels {', '.join(shown + more)}" if counts else ""


def _model(run: Finetuning) -> Iterator[tuple[str, str]]:
    parameters = sum(p.numel() for p in run.model.parameters())
    yield "model", f"{type(run.model).__name__}, {parameters:,} parameters"
    yield "", f"sequences of at most {run.tokenizer.max_length} tokens"
    # Weights, gradients and two moments of Adam, in fp32.
    yield "memory", f"{16 * parameters / 1e6:,.0f} MB for weights, gradients and optimiser, and the activations"


def _steps(run: Finetuning) -> Iterator[tuple[str, str]]:
    arguments, world = run.arguments, World.connect(run.arguments.device)
    loader = loader_of(run.train, run.model, run.task.objective(), arguments, world)
    batches = next(iter(loader.steps(0)))
    tokens = sum(batch.packed.num_tokens for batch in batches)
    each = f"{len(batches)} forward of {tokens:,} tokens in all"
    yield "steps", f"{loader.num_steps(0):,} an epoch, the first: {each}"
    yield "padding saved", f"{loader.padding_saved:.0%} of what the first steps, padded, would compute"
    rate = _tokens_per_second(run, batches[0], world.device)
    if arguments.budget_s is not None:
        yield "time", f"{arguments.budget_s:,.0f} s by the budget; about {rate:,.0f} tokens/s on {world.device}"
    else:
        total = total_steps(loader, arguments)
        seconds = total / loader.num_steps(0) * int(run.train.lengths.sum()) / rate
        yield "", f"{total:,} in all"
        yield "time", f"about {seconds:,.0f} s: {rate:,.0f} tokens/s on {world.device}, measured in one step"


def _tokens_per_second(run: Finetuning, batch: TrainBatch, device: torch.device) -> float:
    """Of forward and backward passes of one batch, without an update; the first pass warms up."""
    model, objective, batch = run.model.to(device).train(), run.task.objective(), batch.to(device)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        loss, _ = objective(model, batch)
        loss.backward()
        float(loss.detach())  # waits for a GPU
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    return batch.packed.num_tokens / seconds
