"""`python -m benchmarks.report`: the README's tables of numbers, from committed rows. `--check` only compares."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from benchmarks.harness import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- numbers: python -m benchmarks.report -->", "<!-- end of numbers -->"
PEER = "sentence-transformers"


def table(path: Path) -> str:
    """One device's encoder rows as Markdown: texts a second, and how many times the peer's in the same run."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    names = sorted({r["backend"] for r in rows} - {PEER})
    lines = [
        f"all-MiniLM-L6-v2, texts to vectors with tokenisation, {first['device']}, {first['threads']} threads, torch "
        f"{first['torch'].split('+')[0]}, {first['date']}: texts/s, and times {PEER} in fp32 in the same run.",
        "",
        f"| texts | tokens each | mode | {' | '.join(names)} | {PEER} |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for mix in ("query", "sentence", "passage"):
        for mode in ("throughput", "batch1"):
            own = {r["backend"]: r for r in rows if r["mode"] == mode and r["case"].startswith(mix)}
            count, tokens = map(int, own[PEER]["case"].removeprefix(f"{mix}-").split("x"))
            rate = {name: 1e3 * count / float(r["ms_p50"]) for name, r in own.items()}
            cells = [f"{rate[name]:,.0f} ({rate[name] / rate[PEER]:.1f}x)" for name in names]
            lines.append(f"| {mix} | {tokens / count:.0f} | {mode} | {' | '.join(cells)} | {rate[PEER]:,.0f} |")
    return "\n".join(lines)


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


def render(readme: str) -> str:
    """The README with its block of numbers made anew."""
    before, rest = readme.split(BEGIN)
    makers = {"encoder": table, "server": serving}
    tables = "\n\n".join(make(path) for kind, make in makers.items() for path in sorted(RESULTS.glob(f"{kind}-*.csv")))
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
