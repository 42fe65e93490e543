"""A classifier end to end: data, fine-tuning, evaluation, the saved model used again.

    python examples/classifier.py --out OUT
    python examples/classifier.py --train train.csv --eval eval.csv --out OUT     # columns: text, label

Without files it learns to say which manual a paragraph is from: Python's (`pydoc_data.topics`) or torch's (docstrings).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
from pathlib import Path

import torch

from fastbert import BertForSequenceClassification, finetune, pack
from fastbert.tokenizer import Tokenizer


def manuals(num_each: int) -> list[dict[str, str]]:
    """So many paragraphs of each manual, in a fixed random order."""
    docstrings = (f.__doc__ for f in vars(torch).values() if callable(f) and isinstance(f.__doc__, str))
    sources = {"python": pydoc_data.topics.topics.values(), "torch": docstrings}
    rows = []
    for label, texts in sources.items():
        blocks = dict.fromkeys(" ".join(block.split()) for text in texts for block in text.split("\n\n"))
        long_enough = [block for block in blocks if 8 <= len(block.split()) <= 60]
        rows += [{"text": block, "label": label} for block in random.Random(0).sample(long_enough, num_each)]
    random.Random(1).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="CSV with the columns text and label")
    parser.add_argument("--eval", help="the same, to measure on")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a BERT encoder")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--examples", type=int, default=400, help="without files: paragraphs of each manual")
    args = parser.parse_args()
    if bool(args.train) != bool(args.eval):
        parser.error("give --train and --eval, or neither")

    rows = [] if args.train else manuals(args.examples)
    train, held_out = (args.train, args.eval) if args.train else (rows[: -len(rows) // 5], rows[-len(rows) // 5 :])
    result = finetune(
        args.model, train, held_out, output_dir=args.out, overwrite=True, num_train_epochs=args.epochs,
        learning_rate=5e-5, max_length=128, text_column="text", label_column="label",
    )  # fmt: skip
    print(f"accuracy on held-out texts: {result.metrics['eval_accuracy']:.3f}")

    model = BertForSequenceClassification.from_pretrained(args.out).eval()
    tokenizer = Tokenizer.from_folder(Path(args.out), 128)
    texts = ["Returns a new tensor with the sine of the elements of input.", "An import statement binds a name."]
    with torch.inference_mode():
        logits = model.logits(model.base_model.encode_packed(pack(tokenizer.encode(texts).ids)))
    for text, label in zip(texts, logits.argmax(-1).tolist(), strict=True):
        print(f"{model.config.id2label[label]:>8}: {text}")


if __name__ == "__main__":
    main()
