"""Semantic search over a corpus: embed it once, keep the vectors, ask.

    python examples/semantic_search.py "how do I catch several errors at once?"
    python examples/semantic_search.py --corpus notes.txt "what did we decide about the boat?"

A corpus is a text file with a blank line between paragraphs; without one it is the language reference that every
Python carries (`pydoc_data.topics`).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from pathlib import Path

import numpy as np

from fastbert import Embedder


def paragraphs(text: str, at_least: int = 8) -> list[str]:
    """The paragraphs of a text that have so many words."""
    found = (" ".join(block.split()) for block in text.split("\n\n"))
    return [block for block in dict.fromkeys(found) if len(block.split()) >= at_least]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="+")
    parser.add_argument("--corpus", type=Path, help="text file, a blank line between paragraphs")
    parser.add_argument("--limit", type=int, help="use the first so many paragraphs")
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--save", type=Path, help="write the vectors here (.npy)")
    args = parser.parse_args()

    text = args.corpus.read_text() if args.corpus else "\n\n".join(pydoc_data.topics.topics.values())
    corpus = paragraphs(text)[: args.limit]
    embedder = Embedder.from_pretrained(args.model)
    start = time.perf_counter()
    vectors = embedder.encode(corpus, normalize_embeddings=True)
    print(f"{len(corpus)} paragraphs in {time.perf_counter() - start:.1f} s")
    if args.save:
        np.save(args.save, vectors)

    for query, vector in zip(args.query, embedder.encode_query(args.query, normalize_embeddings=True), strict=True):
        scores = vectors @ vector
        print(f"\n{query}")
        for i in np.argsort(-scores)[: args.top]:
            print(f"  {scores[i]:.3f}  {corpus[i][:150]}")


if __name__ == "__main__":
    main()
