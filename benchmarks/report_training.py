"""The report's tables of fine-tuning and pretraining, from committed rows."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

TRAINER, GROUPED = "transformers", "transformers-grouped"


def training_table(path: Path) -> str:
    """One device's fine-tuning rows as Markdown: real tokens a second beside Trainer's, and scores where measured."""
    rows = [row for row in _rows(path) if row["dtype"] == "float32"]
    found: dict[str, dict[tuple[str, str], dict[str, str]]] = defaultdict(dict)
    for row in rows:
        for measured in ("speed", "metric") if row["measured"] == "both" else (row["measured"],):
            found[row["dataset"]][row["system"], measured] = row
    first = rows[0]
    lines = [
        f"Fine-tuning all-MiniLM-L6-v2 in fp32, batches of {first['batch_items']}, {first['device']}, torch "
        f"{first['torch'].split('+')[0]}, {first['date']}: real tokens/s in training, and times Trainer's in the same "
        "run; scores over seeds, mean (standard deviation), same items in the same order.",
        "",
        "| data | task | padding | fastbert | Trainer | grouped by length | score | fastbert | Trainer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in sorted(found.items()):
        if ("fastbert", "speed") not in own:
            continue
        rate = {system: float(own[system, "speed"]["tokens_per_second"]) for system in ("fastbert", TRAINER, GROUPED)}
        peer = own[TRAINER, "speed"]
        scores = ["", "", ""]
        if ("fastbert", "metric") in own:
            pair = [own[system, "metric"] for system in ("fastbert", TRAINER)]
            scores = [f"{peer['metric']}, {pair[0]['seeds']} seeds"]
            scores += [f"{float(r['metric_mean']):.3f} ({float(r['metric_std']):.3f})" for r in pair]
        times = rate["fastbert"] / rate[TRAINER]
        cells = [f"{rate['fastbert']:,.0f} ({times:.1f}x)", f"{rate[TRAINER]:,.0f}", f"{rate[GROUPED]:,.0f}", *scores]
        lines.append(f"| {name} | {peer['task']} | {float(peer['padding']):.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pretraining_table(path: Path) -> str:
    """One device's pretraining rows as Markdown: what was learnt beside what needs no model."""
    rows = _rows(path)
    first = rows[0]
    lines = [
        f"Pretraining from scratch on {_span(rows, 'train_tokens', 1e-6, '.1f')} M tokens of English, size "
        f"{first['size']}, {_span(rows, 'vocabulary', 1, ',.0f')} ids, {first['device']}, {first['date']}, "
        "on held-out texts: loss of masked tokens in nats, accuracy of the second task, and accuracy of news topics "
        "after fine-tuning on 400 articles.",
        "",
        "| objective | steps | masked-LM loss | word shares | second task | chance | fine-tuned | from random |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        number = {k: float(row[k]) for k in ("eval_mlm", "unigram", "score", "chance", "finetuned", "from_random")}
        cells = [f"{number[k]:.2f}" for k in ("eval_mlm", "unigram")]
        cells += ["" if row["score"] == "nan" else f"{number[k]:.3f}" for k in ("score", "chance")]
        cells += [f"{number[k]:.3f} ({float(row[f'{k}_std']):.3f})" for k in ("finetuned", "from_random")]
        lines.append(f"| {row['objective']} | {int(row['steps']):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _span(rows: list[dict[str, str]], column: str, scale: float, form: str) -> str:
    """Least to most of a column."""
    values = sorted(
        {format(scale * float(row[column]), form) for row in rows}, key=lambda text: float(text.replace(",", ""))
    )
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
