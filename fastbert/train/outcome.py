"""How a run ends: the folder it leaves, or the batch that broke it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert import plot
from fastbert.tokenizer import Tokenizer
from fastbert.train.arguments import TrainArguments
from fastbert.train.batch import TrainBatch
from fastbert.train.card import Card, write_card
from fastbert.train.checkpoint import Checkpoints
from fastbert.train.distributed import World
from fastbert.train.stepper import NonFinite

METRICS, CURVES = "metrics.json", "curves.png"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        model: in `eval()`; the averages where there are some, the best where `load_best_model_at_end` asked for it.
        steps: optimiser steps done.
        ended: why: `finished`, `time budget`, or `early stopping`.
        metrics: `train_loss` (of the last line of the log), `train_seconds`, `tokens_per_second`, `padding_saved`
            where the loader counts it, and the evaluation of the weights that the model holds, as `eval_...`.
        history: every record of the log.
        best_checkpoint: folder of the best evaluation's checkpoint, if there is one.
    """

    model: nn.Module = field(repr=False)
    steps: int
    ended: str
    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)
    best_checkpoint: Path | None = None


def evaluation(history: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What the evaluation after a step gave, as `eval_...`; empty if there was none."""
    for record in reversed(history):
        found = {name: value for name, value in record.items() if name.startswith("eval_")}
        if record["step"] == step and found:
            return found
    return {}


def run_metrics(history: Sequence[Mapping[str, Any]], seconds: float, num_tokens: float, step: int) -> dict[str, float]:
    """`TrainResult.metrics`, with the evaluation after `step`."""
    metrics = {"train_seconds": seconds, **evaluation(history, step)}
    if seconds:
        metrics["tokens_per_second"] = num_tokens / seconds
    lines = [record for record in history if "loss" in record]
    for name, kept in (("loss", "train_loss"), ("padding_saved", "padding_saved")):
        if lines and name in lines[-1]:
            metrics[kept] = lines[-1][name]
    return metrics


def model_writer(tokenizer: Tokenizer | None) -> Callable[[nn.Module, Path], None]:
    """A function that writes a model by its own `save_pretrained`, and the tokenizer's files beside it."""

    def write(model: nn.Module, folder: Path) -> None:
        save_pretrained = getattr(model, "save_pretrained", None)
        if save_pretrained is not None:  # a plain module is kept by its parameters' names alone
            save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save(folder)

    return write


def leave_folder(
    root: Path,
    result: TrainResult,
    save: Callable[[nn.Module, Path], None],
    card: Card,
    arguments: TrainArguments,
    say: Callable[[str], None],
) -> None:
    """Write the final model, `metrics.json`, the curves and the model card."""
    save(result.model, root)
    (root / METRICS).write_text(json.dumps(result.metrics, indent=1) + "\n", encoding="utf-8")
    plots = []
    try:
        plot.training_curves(root / CURVES, card.title, result.history)
        plots.append(CURVES)
    except ImportError as error:
        say(f"{CURVES} is left out: {error}")
    write_card(root, card, arguments, result.metrics, plots)


def keep_batch(path: Path, batches: Sequence[TrainBatch]) -> None:
    """Write the micro-batches of a step as safetensors, for inspection: `<number>.<field>`."""
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        packed = batch.packed
        fields: Mapping[str, Tensor | None] = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "type_ids": packed.type_ids,
            "cu_seqlens": packed.cu_seqlens,
            "index": batch.index,
            "epoch": torch.tensor(batch.epoch),
            **{f"labels.{name}": value for name, value in batch.labels.items()},
        }
        tensors |= {f"{i}.{name}": value.cpu().contiguous() for name, value in fields.items() if value is not None}
    save_file(tensors, path)


def explain(
    error: NonFinite, batches: Sequence[TrainBatch], root: Path | None, checkpoints: Checkpoints | None, world: World
) -> str:
    """What is to be said of a loss that is not finite; its batch is saved into the output folder, if there is one."""
    place, kept = error.place, ""
    if root is not None:
        rank = f"-rank-{world.rank}" if world.size > 1 else ""
        path = root / f"nonfinite-step-{place.step + 1}{rank}.safetensors"
        keep_batch(path, batches)
        last = checkpoints.newest() if checkpoints is not None else None
        kept = f" Its batch is in {path}." + (f" The last good weights are in {last}." if last else "")
    return (
        f"step {place.step + 1} (epoch {place.epoch}, learning rate {place.learning_rate:.3g}): {error}.{kept} Look at "
        "the batch's ids and labels; where they are right, a lower learning_rate, a longer warm-up, or bf16 instead of "
        "fp16 helps"
    )
