"""`python -m benchmarks.pretraining`: small models from scratch on real English text, and what it was good for.

Each objective is trained on the texts of `benchmarks.corpora` with a vocabulary of its own, and measured on held-out
documents against what needs no model: the cross-entropy of the words' shares, the more frequent answer to pairs, "no
token is replaced". Then the model is fine-tuned on a few news articles beside one with random weights.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness
from benchmarks.corpora import corpus
from benchmarks.labelled import bbc, head
from fastbert.models import AutoModel
from fastbert.train.finetune import finetune
from fastbert.train.pairs import Pairs
from fastbert.train.pretrain import Pretraining, prepare
from fastbert.train.shards import Shards

FAMILIES = {"mlm": "roberta", "mlm+nsp": "bert", "mlm+sop": "albert", "electra": "electra"}
KEY = ("objective", "family", "size", "steps", "batch_tokens", "seq_length", "learning_rate", "dropout", "deviation")


@dataclass(frozen=True)
class PretrainRow(harness.Machine):
    """One objective. Losses in nats a masked token; scores and shares of held-out items or tokens, 0 to 1.

    `deviation` is that of new weights. `unigram` is the loss of the training texts' word shares. `score` answers the
    second question (next sentence, order, replaced tokens), `chance` is the share of its more frequent answer.
    `finetuned` and `from_random` are accuracies of fine-tuning, mean over `seeds`.
    """

    objective: str
    family: str
    size: str
    parameters: int
    steps: int
    batch_tokens: int
    seq_length: int
    learning_rate: float
    dropout: float
    deviation: float
    vocabulary: int
    train_tokens: int
    epochs: float
    eval_mlm: float
    unigram: float
    mlm_accuracy: float
    score: float
    chance: float
    finetuned: float
    finetuned_std: float
    from_random: float
    from_random_std: float
    seeds: int
    tokens_per_second: float
    padding_saved: float


@dataclass(frozen=True)
class CurvePoint:
    """A line of the log of one objective's run; an evaluation or the mean since the last line."""

    objective: str
    step: int
    loss: float | None
    eval_mlm: float | None
    eval_score: float | None


def unigram_loss(train: Shards, held_out: Shards, num_ids: int) -> float:
    """Nats a token of held-out texts under the word shares of the training texts (one is added to each count)."""
    counts = train.unigram_counts(num_ids) + 1.0
    seen = held_out.unigram_counts(num_ids)
    return float(-(seen * np.log(counts / counts.sum())).sum() / seen.sum())


def second_task(run: Pretraining, metrics: dict[str, float]) -> tuple[float, float]:
    """(accuracy, share of the more frequent answer); NaN where there is none."""
    if isinstance(run.eval, Pairs):
        share = float(run.eval.plan[:, 4].mean())
        return metrics[f"eval_{run.objective_name.removeprefix('mlm+')}_accuracy"], max(share, 1 - share)
    if run.objective_name == "electra":
        return metrics["eval_disc_accuracy"], 1 - metrics["eval_replaced"]
    return math.nan, math.nan


def finetuned(folder: Path, seeds: Sequence[int], num_items: int) -> list[float]:
    """Accuracies of telling five topics of news articles apart, at the rate that is best for random weights."""
    data = bbc()
    results = [
        finetune(
            folder,
            head(data.train, num_items),
            data.eval,
            data.task,
            seed=seed,
            num_train_epochs=5.0,
            learning_rate=1e-3,
            batch_size=32,
            max_length=64,
            quiet=True,
            report_to="none",
            peak_tflops=1.0,
        )
        for seed in seeds
    ]
    return [result.metrics["eval_accuracy"] for result in results]


def random_twin(run: Pretraining, folder: Path) -> Path:
    """A folder with the architecture and tokenizer of a run, and fresh weights."""
    torch.manual_seed(1000 + run.arguments.seed)
    AutoModel.from_config(run.model.config).save_pretrained(folder)
    run.tokenizer.save(folder)
    return folder


def measure(objective: str, texts: Path, root: Path, told: argparse.Namespace) -> tuple[PretrainRow, list[CurvePoint]]:
    """Pretrain, evaluate, fine-tune."""
    settings = (told.size, told.seq_length, told.vocab_size, told.batch_tokens, told.steps, told.lr, told.dropout)
    settings += (told.initializer_range,)
    folder = root / "-".join(map(str, (objective.replace("+", "-"), *settings)))  # an interrupted run goes on there
    run = prepare(
        data=sorted(texts.glob("*.txt")), split_sentences=True, holdout=0.03, output_dir=str(folder),
        model_type=FAMILIES[objective], size=told.size, vocab_size=told.vocab_size, seq_length=told.seq_length,
        objective=objective, dupe_factor=4 if "+" in objective else 1, max_steps=told.steps,
        batch_tokens=told.batch_tokens, micro_tokens=told.batch_tokens, learning_rate=told.lr,
        dropout=told.dropout, initializer_range=told.initializer_range,
        eval_steps=told.eval_steps, logging_steps=max(1, told.eval_steps // 5), save_strategy="no", resume=True,
        seed=1,
    )  # fmt: skip
    result = run.run()
    metrics = result.metrics
    score, chance = second_task(run, metrics)
    accuracies = finetuned(folder, range(told.seeds), told.finetune_items)
    fresh = finetuned(random_twin(run, folder / "random"), range(told.seeds), told.finetune_items)
    held_out = Shards.open(folder / "data" / "eval-tokens")
    row = PretrainRow(
        objective=objective,
        family=FAMILIES[objective],
        size=told.size,
        parameters=sum(p.numel() for p in run.model.parameters()),
        steps=result.steps,
        batch_tokens=told.batch_tokens,
        seq_length=told.seq_length,
        learning_rate=told.lr,
        dropout=told.dropout,
        deviation=told.initializer_range,
        vocabulary=run.tokenizer.num_ids,
        train_tokens=run.shards.num_tokens,
        epochs=round(result.steps * told.batch_tokens / float(run.train.lengths.sum()), 2),
        eval_mlm=round(metrics.get("eval_mlm", metrics["eval_loss"]), 4),
        unigram=round(unigram_loss(run.shards, held_out, run.tokenizer.num_ids), 4),
        mlm_accuracy=round(metrics["eval_mlm_accuracy"], 4),
        score=round(score, 4),
        chance=round(chance, 4),
        finetuned=round(statistics.mean(accuracies), 4),
        finetuned_std=round(statistics.pstdev(accuracies), 4),
        from_random=round(statistics.mean(fresh), 4),
        from_random_std=round(statistics.pstdev(fresh), 4),
        seeds=told.seeds,
        tokens_per_second=round(metrics["tokens_per_second"]),
        padding_saved=round(metrics["padding_saved"], 4),
        device=harness.device_name("cuda" if torch.cuda.is_available() else "cpu"),
    )
    return row, curve(objective, result.history)


def curve(objective: str, history: Sequence[dict[str, Any]]) -> list[CurvePoint]:
    """One point a step of the log, its evaluation beside it."""
    points: dict[int, dict[str, float]] = {}
    for record in history:
        points.setdefault(record["step"], {}).update(record)
    names = ("eval_nsp_accuracy", "eval_sop_accuracy", "eval_disc_accuracy")
    return [
        CurvePoint(
            objective,
            step,
            values.get("loss"),
            values.get("eval_mlm", values.get("eval_loss")),
            next((values[name] for name in names if name in values), None),
        )
        for step, values in points.items()
    ]


def write_curve(points: Sequence[CurvePoint], name: str) -> None:
    """Replace the curves of the same objectives in `results/<name>.csv`."""
    path, table = harness.RESULTS / f"{name}.csv", [asdict(point) for point in points]
    new = {point.objective for point in points}
    if path.exists():
        with path.open(newline="") as file:
            table += [dict(row) for row in csv.DictReader(file) if row["objective"] not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(CurvePoint)])
        writer.writeheader()
        writer.writerows(sorted(table, key=lambda row: (row["objective"], int(row["step"]))))


def show(rows: Sequence[PretrainRow]) -> None:
    """A table of the rows."""
    table = Table("objective", "MLM loss", "unigram", "second task", "chance", "fine-tuned", "from random", "tokens/s")
    for r in rows:
        second = ("", "") if math.isnan(r.score) else (f"{r.score:.3f}", f"{r.chance:.3f}")
        after = [f"{m:.3f} ± {s:.3f}" for m, s in ((r.finetuned, r.finetuned_std), (r.from_random, r.from_random_std))]
        table.add_row(
            r.objective, f"{r.eval_mlm:.3f}", f"{r.unigram:.3f}", *second, *after, f"{r.tokens_per_second:,.0f}"
        )
    harness.console().print(table)


def check(row: PretrainRow) -> list[str]:
    """What a run that learnt must show and this one does not."""
    wanted = {
        "the masked-LM loss is not 0.5 nats below the word shares'": row.eval_mlm < row.unigram - 0.5,
        "the second task is not above chance": math.isnan(row.score) or row.score > row.chance,
        "pairs are told apart below 0.6": "+" not in row.objective or row.score > 0.6,
        "fine-tuning is no better than from random weights": row.finetuned > row.from_random,
    }
    return [f"{row.objective}: {told}" for told, holds in wanted.items() if not holds]


def main() -> None:
    """Run the objectives that were asked for; a row of one that did not learn is not written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", default="mlm+nsp,mlm+sop,electra")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--initializer-range", type=float, default=0.08)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finetune-items", type=int, default=400)
    parser.add_argument("--name", default="pretrain-local", help="of the result files")
    cache = os.environ.get("FASTBERT_CACHE", Path.home() / ".cache" / "fastbert")
    parser.add_argument("--folder", type=Path, default=Path(cache) / "pretraining", help="for texts and models")
    told = parser.parse_args()
    texts = told.folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    texts, rows, missed = corpus(texts), [], []
    for objective in told.objectives.split(","):
        row, points = measure(objective, texts, told.folder, told)
        rows.append(row)
        if found := check(row):
            missed += found
        else:
            harness.write([row], told.name, KEY)
            write_curve(points, f"curve-{told.name}")
    show(rows)
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
