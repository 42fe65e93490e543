"""`python -m benchmarks.accuracy`: what each dtype does to vectors and to rankings, on real texts with real weights.

Vectors of 768 texts are held against fp64. Rankings are of real sentence pairs (STS 2015, in FASTBERT_DATA) by their
cosine, against those of fp32.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks import harness
from benchmarks.labelled import data_folder
from benchmarks.models import folder_of
from benchmarks.texts import WORDS, real_texts
from fastbert import Embedder, native
from fastbert.hub import DEFAULT_MODEL

MODELS = (DEFAULT_MODEL, "all-mpnet-base-v2")
DTYPES = ("float32", "high", "bfloat16", "int8")


@dataclass(frozen=True)
class Row(harness.Machine):
    """One dtype of one model: least, 1st percentile and mean cosine to fp64 over `texts`; Spearman's correlation of
    `pairs` scores with fp32's, and with people's."""

    model: str
    dtype: str
    worst_cosine: float
    p1_cosine: float
    mean_cosine: float
    rank_to_fp32: float
    rank_to_people: float
    texts: int
    pairs: int
    plan: str
    isa: str


def pairs(count: int) -> tuple[list[str], list[str], list[float]]:
    """Sentences, their partners and how alike people found them (0 to 5)."""
    with (data_folder("sts2015") / "test.tsv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 3 and row[0]]
    rows = rows[:: max(1, len(rows) // count)][:count]
    return [r[1] for r in rows], [r[2] for r in rows], [float(r[0]) for r in rows]


def scores(embedder: Embedder, left: list[str], right: list[str]) -> np.ndarray:
    """Cosine of each pair."""
    vectors = embedder.encode(left + right, normalize_embeddings=True)
    return (vectors[: len(left)] * vectors[len(left) :]).sum(1)


def load(model: str, dtype: str) -> Embedder:
    """An embedder; `high` is fp32 under torch's precision of that name, which is set for the process."""
    torch.set_float32_matmul_precision("high" if dtype == "high" else "highest")
    return Embedder.from_pretrained(folder_of(model), "float32" if dtype == "high" else dtype, device="cpu")


def measure(model: str, dtypes: list[str], num_texts: int, num_pairs: int) -> list[Row]:
    """Rows of one model."""
    texts = [text for words in WORDS.values() for text in real_texts(words, num_texts // 3)]
    left, right, people = pairs(num_pairs)
    exact_embedder = load(model, "float32")
    base = scores(exact_embedder, left, right)
    exact_embedder.model.double()
    exact = exact_embedder.encode(texts, normalize_embeddings=True).astype(np.float64)
    rows = []
    for dtype in dtypes:
        embedder = load(model, dtype)
        vectors = embedder.encode(texts).astype(np.float64)
        cosines = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
        found = scores(embedder, left, right)
        with torch.inference_mode():
            plan = embedder.model.execution_plan()
        rows.append(
            Row(
                model.split("/")[-1], dtype, round(cosines.min(), 7), round(float(np.quantile(cosines, 0.01)), 7),
                round(cosines.mean(), 7), round(spearmanr(base, found).statistic, 6),
                round(spearmanr(people, found).statistic, 4), len(texts), len(left), plan, native.isa(),
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", help="separated by commas; high only where the CPU has tiles, unless named")
    parser.add_argument("--texts", type=int, default=768)
    parser.add_argument("--pairs", type=int, default=1500)
    args = parser.parse_args()
    default = [d for d in DTYPES if d != "high" or native.require().has_split()]
    dtypes = args.dtypes.split(",") if args.dtypes else default
    rows = [r for model in args.models.split(",") for r in measure(model, dtypes, args.texts, args.pairs)]
    shown = Table("model", "dtype", "worst cosine", "1 %", "mean", "rank to fp32", "rank to people", "runs on")
    for r in rows:
        figures = (
            f"{r.worst_cosine:.6f} {r.p1_cosine:.6f} {r.mean_cosine:.6f} {r.rank_to_fp32:.5f} {r.rank_to_people:.4f}"
        )
        shown.add_row(r.model, r.dtype, *figures.split(), r.plan.split(",")[0])
    harness.console().print(shown)
    path = harness.write(rows, harness.file_of("accuracy", "cpu"), ("model", "dtype", "isa"))
    print(f"{len(rows)} rows in {path.relative_to(harness.RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
