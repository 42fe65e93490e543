"""What a fine-tuning run would do, as a table, without doing it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from rich.table import Table

from fastbert.train.batch import collate
from fastbert.train.distributed import World
from fastbert.train.estimate import Probe, probe, state_bytes
from fastbert.train.examples import Examples
from fastbert.train.feed import loader_of
from fastbert.train.finetune import Finetuning, label_counts
from fastbert.train.loader import Loader
from fastbert.train.precision import choose_precision
from fastbert.train.schedule import total_steps

MAX_LABELS = 8  # shown with their counts
PROBE_TOKENS = {"cpu": 1024, "cuda": 16384}  # enough to keep the device busy, few enough to take seconds


def plan_table(run: Finetuning) -> Table:
    """Data, model, steps, memory and an estimate of the time, two columns; a few passes are computed for it."""
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


def _steps(run: Finetuning) -> Iterator[tuple[str, str]]:
    arguments, world = run.arguments, World.connect(run.arguments.device)
    loader = loader_of(run.train, run.model, run.task.objective(), arguments, world)
    batches = next(iter(loader.steps(0)))
    tokens = sum(batch.packed.num_tokens for batch in batches)
    passes = f"the first of {tokens:,} tokens in {len(batches)} forward pass{'es' if len(batches) > 1 else ''}"
    yield "steps", f"{loader.num_steps(0):,} an epoch, {passes}"
    yield "padding saved", f"{loader.padding_saved:.0%} of what the first step, padded, would compute"
    found = _probe(run, loader, world.device)
    passed = found.saved_bytes_per_token * max(batch.packed.num_tokens for batch in batches)
    yield "memory", f"about {(state_bytes(run.model) + passed) / 1e6:,.0f} MB"
    rate = f"{found.tokens_per_second:,.0f} tokens/s on {world.device}, measured"
    if arguments.budget_s is not None:
        yield "time", f"{arguments.budget_s:,.0f} s by the budget; {rate}"
    else:
        total = total_steps(loader, arguments)
        tokens = total / loader.num_steps(0) * int(run.train.lengths.sum())
        yield "time", f"about {tokens / found.tokens_per_second:,.0f} s for {total:,} steps; {rate}"


def _probe(run: Finetuning, loader: Loader, device: torch.device) -> Probe:
    """A measurement with the first items of the first step, as many as it takes."""
    items = loader.items(0, 0)
    few = items[
        : max(1, int((run.train.lengths[items].cumsum() <= PROBE_TOKENS.get(device.type, 4096)).sum()))
    ].tolist()
    objective, offset = run.task.objective(), run.model.base_model.position_offset
    batch = collate([run.train[i] for i in few], few, 0, offset, objective.token_fields)
    with torch.random.fork_rng([]):
        return probe(run.model, objective, batch, device, choose_precision(run.arguments, device))
