"""Pretraining from scratch: a vocabulary learnt from texts, a fresh BERT, masked words, and what it then guesses.

    python examples/pretrain_from_scratch.py --out OUT
    python examples/pretrain_from_scratch.py --data novels/*.txt --size small --steps 20000 --out OUT

Without files the texts are the language reference that every Python carries: enough to see the loss fall, no more.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from pathlib import Path

from fastbert import pretrain


def reference(folder: Path) -> Path:
    """The language reference as one document a topic: blank line between paragraphs, two between documents."""
    path = folder / "reference.txt"
    topics = (text.strip().split("\n\n") for text in pydoc_data.topics.topics.values())
    path.write_text("\n\n\n".join("\n\n".join(" ".join(b.split()) for b in blocks) for blocks in topics))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="text files")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--size", default="tiny", help="tiny, mini, small, medium, base, large")
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        result = pretrain(
            data=tuple(args.data or [str(reference(Path(scratch)))]), split_sentences=True, holdout=0.05,
            vocab_size=args.vocab_size, model_type="bert", size=args.size, objective="mlm", max_steps=args.steps,
            batch_tokens=args.batch_tokens, learning_rate=5e-4, output_dir=args.out, overwrite=True,
            logging_steps=max(1, args.steps // 10), eval_strategy="no", save_strategy="no",
        )  # fmt: skip
    losses = [row["loss"] for row in result.history if "loss" in row]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {result.steps} steps; the model lies in {args.out}")


if __name__ == "__main__":
    main()
