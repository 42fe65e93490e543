"""`python -m benchmarks.report`: the README's tables of numbers, from committed rows. `--check` only compares."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import RESULTS
from benchmarks.report_gpu import gpu_table
from benchmarks.report_training import pretraining_table, training_table

README = RESULTS.parent.parent / "README.md"
# The site includes what stands between: docs/design/numbers.md.
BEGIN = "<!-- python -m benchmarks.report --8<-- [start:numbers] -->"
END = "<!-- --8<-- [end:numbers] -->"
PEER = "sentence-transformers"


MIXES, MODES = ("query", "sentence", "passage"), ("throughput", "batch1")


def table(path: Path) -> str:
    """One device's encoder rows as Markdown: a line a provider, texts a second, and how many times the peer's in the
    same run. What is fastest of its number format is bold, whosever it is."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"].split("-")[0] in MIXES]
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
            f"torch {first['torch'].split('+')[0]}, {first['date']}: texts/s, the median, and times {PEER} in fp32 "
            "in that run, by the faster half of the rounds (~: the parts of the run differ by more than 10 %). "
            "Columns are texts a call x tokens each; bold is the fastest of its number format.",
            "",
            f"| | {' | '.join(heads)} |",
            "|---|" + "---|" * len(columns),
            *(f"| {name} | {' | '.join(cells[name])} |" for name in order),
            "",
            said([f"{', '.join(names)} ({heads[i]})" for i in range(len(columns)) if (names := _winners(i, cells))]),
        ]
    )


def said(wins: list[str]) -> str:
    """The sentence below the table that says where a peer is the fastest of its number format."""
    if wins:
        return f"A peer is the fastest of its number format: {'; '.join(wins)}."
    return "No peer is the fastest of its number format in any column."


def _winners(column: int, cells: dict[str, list[str]]) -> list[str]:
    return [name for name in sorted(cells) if cells[name][column].startswith("**") and not name.startswith("fastbert")]


def _cell(name: str, members: dict[str, dict[str, str]], count: int) -> str:
    if name not in members:
        return "-"
    row = members[name]
    rivals = [r for r in members.values() if r["dtype"] == row["dtype"]]
    mark = harness.mark(float(row["times_low"]), float(row["times_high"]))
    text = f"{1e3 * count / float(row['ms_p50']):,.0f} ({mark}{float(row['times_base']):.1f}x)"
    fastest = len(rivals) > 1 and float(row["ms_p50"]) == min(float(r["ms_p50"]) for r in rivals)
    return f"**{text}**" if fastest else text


def serving(path: Path) -> str:
    """One device's serving rows as Markdown: texts a second of each server, and latencies at half of that."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["test"] == "load"]
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


TABLES = {
    "encoder": ("Texts to vectors", table),
    "server": ("Serving", serving),
    "training": ("Fine-tuning", training_table),
    "pretrain": ("Pretraining", pretraining_table),
    "gpu": ("On a GPU", gpu_table),
}


def render(readme: str) -> str:
    """The README with its block of numbers made anew."""
    before, rest = readme.split(BEGIN)
    parts = []
    for kind, (title, make) in TABLES.items():
        made = [table for path in sorted(RESULTS.glob(f"{kind}-*.csv")) if (table := make(path))]
        parts += [f"### {title}", *made] if made else []
    tables = "\n\n".join(parts)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the README, or with `--check` exit 1 where it differs from the rows."""
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv:
        sys.exit(0 if new == old else "README.md differs from benchmarks/results: run python -m benchmarks.report")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
