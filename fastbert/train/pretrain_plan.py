"""What a pretraining run would do, as a table, without doing it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from rich.table import Table

from fastbert.train.batch import TrainBatch, collate
from fastbert.train.distributed import World
from fastbert.train.estimate import Probe, probe, state_bytes
from fastbert.train.feed import loader_of
from fastbert.train.flops import model_flops
from fastbert.train.loader import Loader
from fastbert.train.precision import choose_precision, widen
from fastbert.train.pretrain import Pretraining
from fastbert.train.schedule import total_steps

PROBE_TOKENS = {"cpu": 1024, "cuda": 16384}  # enough to keep the device busy, few enough to take seconds


def plan_table(run: Pretraining) -> Table:
    """Texts, model, steps, and estimates of memory and time; two columns."""
    kind = run.model.config.model_type
    table = Table(title=f"{kind}, {run.objective_name}, {run.arguments.seq_length} tokens", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    world = World.connect(run.arguments.device, run.arguments.ddp_timeout)
    loader = loader_of(run.train, run.model, run.objective, run.arguments, world)
    with torch.random.fork_rng([]):
        measured = _measure(run, world.device)
    for rows in (_texts(run), _model(run), _steps(run, loader), _costs(run, loader, world.device, measured)):
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()
    return table


def _texts(run: Pretraining) -> Iterator[tuple[str, str]]:
    shards = run.shards
    yield (
        "texts",
        f"{shards.num_documents:,} documents, {shards.num_sentences:,} sentences, {shards.num_tokens:,} tokens",
    )
    for name, items in (("train", run.train), ("eval", run.eval)):
        if items is not None:
            middle, longest = np.percentile(items.lengths, (50, 100)).astype(int)
            total = int(items.lengths.sum())
            yield name, f"{len(items):,} items, {total:,} tokens; lengths {middle} (median), {longest} (longest)"
    yield "vocabulary", f"{run.tokenizer.num_ids:,} ids"


def _model(run: Pretraining) -> Iterator[tuple[str, str]]:
    parameters = sum(p.numel() for p in run.model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in run.model.modules() if isinstance(m, torch.nn.Embedding)}
    yield "model", f"{type(run.model).__name__}, {parameters:,} parameters, {sum(tables.values()):,} in embeddings"


def _steps(run: Pretraining, loader: Loader) -> Iterator[tuple[str, str]]:
    per_epoch, items = loader.num_steps(0), len(loader.items(0, 0))
    tokens = int(loader.lengths[loader.items(0, 0)].sum())
    yield "steps", f"{per_epoch:,} an epoch; the first has {items:,} items, {tokens:,} tokens"
    if fill := loader.fill(0):
        yield "filled", f"{fill.mean:.1%} of {loader.batch_tokens:,} tokens a step, the least {fill.least:.1%}"
    if run.arguments.budget_s is None:
        total = total_steps(loader, run.arguments)
        yield "in all", f"{total:,} steps, {total / per_epoch:.2f} epochs"


def _costs(run: Pretraining, loader: Loader, device: torch.device, measured: Probe) -> Iterator[tuple[str, str]]:
    lengths, arguments = loader.lengths.astype(np.float64), run.arguments
    flops = model_flops(run.model)(lengths.sum(), (lengths**2).sum()) / lengths.sum()
    yield "arithmetic", f"{flops / 1e6:,.1f} MFLOP a token, forward and backward"
    step = float(lengths.sum()) / loader.num_steps(0) / loader.world_size
    state, passed = state_bytes(run.model), measured.saved_bytes_per_token * min(arguments.micro_tokens, step)
    yield (
        "memory",
        f"{_bytes(state)} weights, gradients, optimiser; {_bytes(passed)} activations (less with fewer --micro-tokens)",
    )
    rate = measured.tokens_per_second
    yield "speed", f"{rate:,.0f} tokens/s on {device}, measured with {measured.num_tokens:,} tokens"
    if arguments.budget_s is not None:
        tokens = arguments.budget_s * rate * loader.world_size
        yield "time", f"{_time(arguments.budget_s)} by the budget: about {tokens / lengths.sum():.2f} epochs"
        return
    seconds = total_steps(loader, arguments) * step / rate
    yield "time", f"about {_time(seconds)}"
    if arguments.peak_tflops is not None:
        least = seconds * rate * flops / (arguments.peak_tflops * 1e12)
        yield "", f"at least {_time(least)} at {arguments.peak_tflops:g} TFLOP/s, if nothing was lost"


def _measure(run: Pretraining, device: torch.device) -> Probe:
    widen(run.model)
    return probe(run.model, run.objective, _batch(run, device), device, choose_precision(run.arguments, device))


def _batch(run: Pretraining, device: torch.device) -> TrainBatch:
    """Items from all over the dataset, as many as the probe takes."""
    wanted = min(PROBE_TOKENS.get(device.type, 4096), run.arguments.micro_tokens)
    num = max(1, min(len(run.train), int(wanted / float(run.train.lengths.mean()))))
    index = np.linspace(0, len(run.train) - 1, num).astype(int).tolist()
    items = [run.train[i] for i in index]
    return collate(items, index, 0, run.model.base_model.position_offset, run.objective.token_fields)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"
