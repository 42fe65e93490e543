"""`python -m benchmarks.idle`: one short text a call, after nothing was asked for a while: p50 and p99 by the gap.

What makes a call after a gap slow is told apart by how the gap is spent and by the number of threads:

* spin: the caller's core stays awake, caches stay warm; with two threads only the worker has to be woken;
* sleep: the caller's core goes idle too, as a server's does between requests;
* evict: as spin, and the caller's core reads a buffer larger than its caches, so that weights are fetched anew.

With one thread there is nobody to wake. Each provider has a process of its own: libraries' threads spin between calls.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from benchmarks import harness
from benchmarks.providers import OWN, dtype_of, make, package_of
from benchmarks.texts import WORDS, real_texts
from fastbert import native
from fastbert.hub import DEFAULT_MODEL, resolve

GAPS_MS = (0, 1, 2, 5, 20)
EVICTED_BYTES = 64 << 20


@dataclass(frozen=True)
class Row(harness.Machine):
    """Latency of a call in ms after gaps of one length, spent in one way; `over_p50` is p99 over that cell's p50."""

    provider: str
    dtype: str
    wait: str
    gap_ms: int
    ms_p50: float
    ms_p90: float
    ms_p99: float
    over_p50: float
    samples: int
    text_words: int
    isa: str
    version: str


def spin(seconds: float) -> None:
    """Pass time without giving up the core."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def evict(buffer: np.ndarray, seconds: float) -> None:
    """Read through a buffer, and pass the rest of the time without giving up the core."""
    end = time.perf_counter() + seconds
    buffer.sum()
    spin(end - time.perf_counter())


def measure(name: str, folder: str, scratch: str, threads: int, samples: int) -> list[Row]:
    """Rows of one provider; `threads` is of ours, peers take all."""
    torch.set_num_threads(threads)
    encode = make(name, Path(folder), Path(scratch))
    text = sorted(real_texts(WORDS["query"], 99), key=len)[49]
    buffer = np.ones(EVICTED_BYTES // 8)
    waits: dict[str, Callable[[float], None]] = {"spin": spin, "sleep": time.sleep, "evict": partial(evict, buffer)}
    cells = [(wait, gap) for wait in waits for gap in GAPS_MS if gap or wait == "spin"]
    for _ in range(50):
        encode([text])
    found: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    rng = random.Random(0)
    for _ in range(samples):
        for wait, gap in rng.sample(cells, len(cells)):
            waits[wait](gap / 1e3)
            start = time.perf_counter()
            encode([text])
            found[wait, gap].append(1e3 * (time.perf_counter() - start))
    rows = []
    for (wait, gap), times in found.items():
        p50, p90, p99 = np.percentile(times, (50, 90, 99))
        rows.append(
            Row(
                name, dtype_of(name), wait, gap, *(round(float(p), 4) for p in (p50, p90, p99)),
                round(float(p99 / p50), 2), samples, len(text.split()), native.isa(), package_of(name),
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="fastbert,fastbert-bf16,onnxruntime", help="providers, separated by commas")
    parser.add_argument("--samples", type=int, default=300, help="calls a cell")
    parser.add_argument("--dry-run", action="store_true", help="write no rows")
    args = parser.parse_args()
    folder, most = str(resolve(DEFAULT_MODEL)), torch.get_num_threads()
    turns = [(n, t) for n in args.only.split(",") for t in ((1, most) if n in OWN else (most,))]
    rows: list[Row] = []
    for name, threads in turns:
        with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(1) as pool:
            rows += pool.apply(measure, (name, folder, scratch, threads, args.samples))
    shown = Table("provider", "threads", "wait", *(f"{gap} ms" for gap in GAPS_MS), title="ms p50 / p99 (p99 over p50)")
    for name, threads in turns:
        for wait in ("spin", "sleep", "evict"):
            cells = {r.gap_ms: r for r in rows if (r.provider, r.threads, r.wait) == (name, threads, wait)}
            figures = (
                f"{cells[g].ms_p50:.2f} / {cells[g].ms_p99:.2f} ({cells[g].over_p50:.1f})" if g in cells else "-"
                for g in GAPS_MS
            )
            shown.add_row(name, str(threads), wait, *figures)
    harness.console().print(shown)
    if not args.dry_run:
        path = harness.write(rows, harness.file_of("idle", "cpu"), ("provider", "threads", "wait", "gap_ms"))
        print(f"load {harness.load()}; {len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
