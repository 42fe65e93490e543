"""`python -m benchmarks.report`: the README's table of numbers, from committed rows. `--check` only compares."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from benchmarks.harness import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- numbers: python -m benchmarks.report -->", "<!-- end of numbers -->"
OWN = "fastbert"


def table(path: Path) -> str:
    """One device's encoder rows as Markdown: texts a second, beside the run's fastest peer of the same dtype."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    peers = sorted({r["backend"] for r in rows if not r["backend"].startswith(OWN)})
    lines = [
        f"all-MiniLM-L6-v2, texts to vectors with tokenisation, {first['device']}, {first['threads']} threads, torch "
        f"{first['torch'].split('+')[0]}, {first['date']}: texts/s, and the fastest peer of the same dtype "
        f"in the same run ({', '.join(peers)}; int8 peers are held to no accuracy).",
        "",
        "| texts | tokens each | mode | dtype | fastbert | fastest peer | times it |",
        "|---|---|---|---|---|---|---|",
    ]
    for mix in ("query", "sentence", "passage"):
        for mode in ("throughput", "batch1"):
            for dtype in ("float32", "bfloat16", "int8"):
                here = [r for r in rows if (r["mode"], r["dtype"]) == (mode, dtype) and r["case"].startswith(mix)]
                own = next((r for r in here if r["backend"].startswith(OWN)), None)
                others = sorted((float(r["ms_p50"]), r["backend"]) for r in here if r is not own)
                if own is None:
                    continue
                count, tokens = map(int, own["case"].removeprefix(f"{mix}-").split("x"))
                ms = float(own["ms_p50"])
                cells = [f"{1e3 * count / ms:,.0f}", "none", ""]
                if others:
                    best, name = others[0]
                    cells[1:] = [f"{1e3 * count / best:,.0f} ({name})", f"{best / ms:.2f}{', it wins' * (best < ms)}"]
                lines.append(f"| {mix} | {tokens / count:.0f} | {mode} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render(readme: str) -> str:
    """The README with its block of numbers made anew."""
    before, rest = readme.split(BEGIN)
    tables = "\n\n".join(table(path) for path in sorted(RESULTS.glob("encoder-*.csv")))
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
