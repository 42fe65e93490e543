"""Named entities: fine-tune a tagger, then look at what it finds.

    python examples/ner.py --out OUT
    python examples/ner.py --train train.conll --eval eval.conll --out OUT

Without files it learns to find code in prose. The labels are the authors' own: the language reference that every Python
carries puts code between double quotes; the quotes are removed and the words between them are the entities.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
import re

from fastbert import finetune


def quoted(num: int) -> list[dict[str, list[str]]]:
    """So many sentences with code in them: words, and tags in IOB2."""
    rows = []
    for text in pydoc_data.topics.topics.values():
        for block in text.split("\n\n"):
            block = " ".join(block.split())
            if not 8 <= len(block.split()) <= 60 or block.count('"') % 2 or '"' not in block or ">>>" in block:
                continue
            words, tags = [], []
            for i, part in enumerate(block.split('"')):  # every second part stood between quotes
                found = re.findall(r"\w+|[^\w\s]", part)
                words += found
                tags += [("B-CODE" if j == 0 else "I-CODE") if i % 2 else "O" for j in range(len(found))]
            rows.append({"words": words, "tags": tags})
    random.Random(0).shuffle(rows)
    return rows[:num]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help=".conll, or .jsonl with the columns words and tags")
    parser.add_argument("--eval", help="the same, to measure on")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--examples", type=int, default=800, help="without files: sentences")
    args = parser.parse_args()
    if bool(args.train) != bool(args.eval):
        parser.error("give --train and --eval, or neither")

    rows = [] if args.train else quoted(args.examples)
    train, held_out = (args.train, args.eval) if args.train else (rows[: -len(rows) // 5], rows[-len(rows) // 5 :])
    result = finetune(
        args.model, train, held_out, task="ner", output_dir=args.out, overwrite=True, num_train_epochs=args.epochs,
        learning_rate=1e-4, max_length=128,
    )  # fmt: skip
    for name, value in sorted(result.metrics.items()):
        if name.startswith("eval_"):
            print(f"{name}: {value:.3f}")
    print(f"serve it: fastbert serve {args.out}")


if __name__ == "__main__":
    main()
