"""`python -m benchmarks.report`: the README's tables of numbers, from committed rows. `--check` only compares."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- numbers: python -m benchmarks.report -->", "<!-- end of numbers -->"
PEER, TRAINER, GROUPED = "sentence-transformers", "transformers", "transformers-grouped"


MIXES, MODES = ("query", "sentence", "passage"), ("throughput", "batch1")


def table(path: Path) -> str:
    """One device's encoder rows as Markdown: a line a provider, texts a second, and how many times the peer's in the
    same run. What is fastest of its number format is bold, whosever it is."""
    rows = [row for row in _rows(path) if row["case"].split("-")[0] in MIXES]
    newest: dict[tuple[str, str], str] = {}  # of each kind of texts the case measured last
    for row in sorted(rows, key=lambda row: row["date"]):
        newest[row["case"].split("-")[0], row["mode"]] = row["case"]
    columns = [(mix, mode) for mode in MODES for mix in MIXES]
    cells: dict[str, list[str]] = {}
    heads = []
    for mix, mode in columns:
        case = newest[mix, mode]
        count, tokens = map(int, case.removeprefix(f"{mix}-").split("x"))
        heads.append(f"{count} x {tokens / count:.0f}" if count > 1 else f"1 x {tokens}")
        members = {row["backend"]: row for row in rows if (row["case"], row["mode"]) == (case, mode)}
        for name in {row["backend"] for row in rows}:
            cells.setdefault(name, []).append(_cell(name, members, count))
    first = next(row for row in rows if row["case"] == newest["sentence", "throughput"])
    speed = {r["backend"]: float(r["ms_p50"]) for r in rows if r["case"] == first["case"]}
    order = sorted(cells, key=lambda name: speed.get(name, float("inf")))
    return "\n".join(
        [
            f"all-MiniLM-L6-v2, texts to vectors with tokenisation, {first['device']}, {first['threads']} threads, "
            f"torch {first['torch'].split('+')[0]}, {first['date']}: texts/s, and times {PEER} in fp32 in that run. "
            "Columns are texts a call x tokens each; bold is the fastest of its number format.",
            "",
            f"| | {' | '.join(heads)} |",
            "|---|" + "---|" * len(columns),
            *(f"| {name} | {' | '.join(cells[name])} |" for name in order),
        ]
    )


def _cell(name: str, members: dict[str, dict[str, str]], count: int) -> str:
    if name not in members:
        return "-"
    row = members[name]
    rivals = [r for r in members.values() if r["dtype"] == row["dtype"]]
    ratio = row.get("times_base") or float(members[PEER]["ms_p50"]) / float(row["ms_p50"])
    text = f"{1e3 * count / float(row['ms_p50']):,.0f} ({float(ratio):.1f}x)"
    fastest = len(rivals) > 1 and float(row["ms_p50"]) == min(float(r["ms_p50"]) for r in rivals)
    return f"**{text}**" if fastest else text


def serving(path: Path) -> str:
    """One device's serving rows as Markdown: texts a second of each server, and latencies at half of that."""
    rows = [row for row in _rows(path) if row["test"] == "load"]
    first = rows[0]
    names = sorted({r["server"] for r in rows})
    lines = [
        f"Served over HTTP on the loopback address, load generator on the same {first['threads']} cores, "
        f"{first['date']}: texts/s with every client waiting (in brackets, of what `Embedder.encode` does with as many "
        "texts at once), and p50/p99 in ms at half of that rate, open loop.",
        "",
        f"| texts | clients x texts each | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    cells: dict[tuple[str, int, int], dict[str, str]] = {}
    for r in rows:
        text = (
            f"{float(r['texts_s']):,.0f} ({float(r['of_inflight_percent']):.0f} %), "
            f"{float(r['ms_p50']):.1f}/{float(r['ms_p99']):.1f}"
        )
        cells.setdefault((r["texts"], int(r["texts_a_request"]), int(r["clients"])), {})[r["server"]] = text
    mixes = ("query", "sentence", "passage")
    for mix, each, clients in sorted(cells, key=lambda key: (mixes.index(key[0]), *key[1:])):
        found = cells[mix, each, clients]
        lines.append(f"| {mix} | {clients} x {each} | {' | '.join(found.get(name, '-') for name in names)} |")
    return "\n".join(lines)


def training_table(path: Path) -> str:
    """One device's fine-tuning rows as Markdown: real tokens a second beside Trainer's, and the scores where measured."""
    rows = [row for row in _rows(path) if row["dtype"] == "float32"]
    found: dict[str, dict[tuple[str, str], dict[str, str]]] = defaultdict(dict)
    for row in rows:
        for measured in ("speed", "metric") if row["measured"] == "both" else (row["measured"],):
            found[row["dataset"]][row["system"], measured] = row
    first = rows[0]
    lines = [
        f"Fine-tuning all-MiniLM-L6-v2 in fp32, batches of {first['batch_items']}, {first['device']}, torch "
        f"{first['torch'].split('+')[0]}, {first['date']}: real tokens/s in training, and times Trainer's in the same run; "
        "scores over seeds, mean (standard deviation), same items in the same order.",
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
        f"Pretraining from scratch on {int(first['train_tokens']) / 1e6:.1f} M tokens of English, size {first['size']}, "
        f"{int(first['vocabulary']):,} ids, {first['device']}, {first['date']}, on held-out texts: loss of masked tokens "
        "in nats, accuracy of the second task, and accuracy after fine-tuning on film reviews.",
        "",
        "| objective | steps | masked-LM loss | word shares | second task | chance | fine-tuned | from random weights |",
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


TABLES = {
    "encoder-*.csv": table,
    "training-*.csv": training_table,
    "pretrain-*.csv": pretraining_table,
    "server-*.csv": serving,
}


def render(readme: str) -> str:
    """The README with its block of numbers made anew."""
    before, rest = readme.split(BEGIN)
    tables = [write(path) for pattern, write in TABLES.items() for path in sorted(RESULTS.glob(pattern))]
    block = "\n\n".join(tables)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the README, or with `--check` exit 1 where it differs from the rows."""
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv:
        sys.exit(0 if new == old else "README.md differs from benchmarks/results: run python -m benchmarks.report")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
