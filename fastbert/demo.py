"""`python -m fastbert.demo`: sixteen sentences, their vectors, and which of them say the same."""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from fastbert.embedder import Embedder
from fastbert.hub import DEFAULT_MODEL

SENTENCES = (
    "The ferry to the island was cancelled because of the storm.",
    "Bad weather stopped the boat from crossing to the island.",
    "Knead the dough for ten minutes, then let it rise under a cloth.",
    "Work the bread dough until it is smooth and leave it to prove.",
    "My laptop battery dies within an hour of unplugging it.",
    "The notebook only lasts about sixty minutes without the charger.",
    "The central bank left interest rates where they were.",
    "Policymakers decided not to change the cost of borrowing.",
    "A young owl is learning to hunt at night.",
    "The fledgling practises catching mice in the dark.",
    "She solved the puzzle by working backwards from the answer.",
    "Starting at the solution and reversing each step cracked the riddle.",
    "The striker scored twice in the final minutes.",
    "Two late goals from the forward decided the match.",
    "Our train leaves from platform nine at a quarter past six.",
    "Violins made in Cremona are still prized by soloists.",
)
NUM_PAIRS = 7
NUM_RUNS = 5


def nearest_pairs(cosine: torch.Tensor, num_pairs: int) -> list[tuple[float, int, int]]:
    """The most similar pairs of a symmetric (S, S) similarity: (value, row, column) with row < column, best first."""
    num_rows = cosine.shape[0]
    rows, columns = torch.triu_indices(num_rows, num_rows, offset=1)
    values, order = cosine[rows, columns].sort(descending=True)
    best = order[:num_pairs]
    return list(zip(values.tolist(), rows[best].tolist(), columns[best].tolist(), strict=False))


def main() -> None:
    """Embed `SENTENCES` with the default model and print the nearest pairs, the time and what to try next."""
    console = Console(highlight=False)
    embedder = Embedder.from_pretrained(DEFAULT_MODEL)
    texts = list(SENTENCES)
    times = []
    for _ in range(NUM_RUNS):  # the first run pays for threads and memory
        start = time.perf_counter()
        out = embedder.encode_with_stats(texts, normalize_embeddings=True)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)

    table = Table("cosine", "sentence", "nearest", title=f"The {NUM_PAIRS} nearest pairs", show_lines=True)
    table.columns[0].style = "bold"
    table.columns[1].ratio = table.columns[2].ratio = 1
    for value, i, j in nearest_pairs(out.vectors @ out.vectors.T, NUM_PAIRS):
        table.add_row(f"{value:.3f}", texts[i], texts[j])
    console.print(table)
    console.print(
        f"{len(texts)} sentences, {out.num_tokens} tokens, {out.vectors.shape[1]} features each: "
        f"{seconds * 1e3:.1f} ms (median of {NUM_RUNS}), {out.num_tokens / seconds:,.0f} tokens/s on {embedder.device}",
        soft_wrap=True,
    )
    console.print(
        "Next, your own file: [bold]fastbert embed --input texts.txt --output vectors.npy[/bold]", soft_wrap=True
    )


if __name__ == "__main__":
    main()
