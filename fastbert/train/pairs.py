"""Items of two segments and a question about them: BERT's next sentence and ALBERT's sentence order.

The plan of an item is two ranges of tokens and an answer: what the original builders take out of a document, cut and
truncate is always one stretch of it.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from random import Random
from typing import Any, Literal

import numpy as np

from fastbert.corpus import CorpusError
from fastbert.train.segments import Frame
from fastbert.train.shards import Shards

Task = Literal["nsp", "sop"]
LABELS = {"nsp": "next_sentence_label", "sop": "sentence_order_label"}
Range = tuple[int, int]


class Pairs:
    """Items `[CLS] A [SEP] B [SEP]`: a dataset for `Loader`.

    Built as google-research/bert's `create_pretraining_data.py` does: sentences of a document are gathered until they
    fill a target length, which with probability `short_seq_prob` is a random one for the document; the first of them,
    a random number, are A. For `nsp`, with probability 1/2 and always where there is one sentence, B is taken from a
    random place of another document (label 1) and the sentences that B would have been are put back; else they are B
    (label 0). For `sop` (google-research/albert) A and B are consecutive, with probability 1/2 swapped (label 1); where
    there is one sentence, B is random (label 1). What is too long loses tokens of the longer segment, at its front or
    back with equal probability.

    Args:
        shards: where the tokens are; `plan_pairs` says what they must hold.
        frame: special tokens.
        max_length: tokens an item at most, special ones included.
        task: `nsp` or `sop`.
        short_seq_prob: share of documents that give shorter items.
        dupe_factor: passes over the documents, each with other draws; all are in the dataset.
        seed: of all draws.

    Attributes:
        plan: (N, 5) int64: begin and end of A, begin and end of B, label.
        lengths: (N) int64 tokens, special ones included.
    """

    def __init__(
        self,
        shards: Shards,
        frame: Frame,
        max_length: int,
        task: Task = "nsp",
        short_seq_prob: float = 0.1,
        dupe_factor: int = 1,
        seed: int = 0,
    ) -> None:
        self.shards, self.frame, self.label = shards, frame, LABELS[task]
        settings = f"{shards.fingerprint} {max_length} {task} {short_seq_prob} {dupe_factor} {seed} 1"
        name = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        path = shards.folder / f"{task}-{name}.npy"
        if not path.is_file():
            plan = plan_pairs(shards, max_length, task, short_seq_prob, dupe_factor, seed)
            scratch = path.with_name(f"{path.stem}.{os.getpid()}.saving.npy")  # several ranks may write the same
            np.save(scratch, plan)
            os.replace(scratch, path)
        self.plan = np.load(path, mmap_mode="r")
        self.lengths: np.ndarray = self.plan[:, 1] - self.plan[:, 0] + self.plan[:, 3] - self.plan[:, 2] + 3

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """`input_ids`, `type_ids` (0 up to the first separator, then 1) and the label of item `i`."""
        a, a_end, b, b_end, label = self.plan[i].tolist()
        first = [self.frame.first, *self.shards.tokens(a, a_end).tolist(), self.frame.last]
        second = [*self.shards.tokens(b, b_end).tolist(), self.frame.last]
        types = [0] * len(first) + [1] * len(second)
        return {"input_ids": first + second, "type_ids": types, self.label: label}


def plan_pairs(
    shards: Shards, max_length: int, task: Task, short_seq_prob: float, dupe_factor: int, seed: int
) -> np.ndarray:
    """(N, 5) int64 items: begin and end of A, begin and end of B, label. Arguments as of `Pairs`.

    Raises:
        ValueError: an argument out of its range.
        CorpusError: fewer than two documents, or none of several sentences: every B would be a random one.
    """
    if task not in LABELS or max_length < 5 or dupe_factor < 1 or not 0.0 <= short_seq_prob <= 1.0:
        raise ValueError(
            f"task is {task!r} (nsp or sop), max_length {max_length} (5 or more), dupe_factor {dupe_factor} (1 or "
            f"more), short_seq_prob {short_seq_prob} (0 to 1)"
        )
    per_document = np.diff(shards.document_starts)
    if len(per_document) < 2 or per_document.max() < 2:
        raise CorpusError(
            f"{task} needs at least two documents of several sentences, but {len(per_document):,} documents have at "
            f"most {per_document.max()} sentences: put blank lines between documents and one sentence on a line, let "
            "sentences be found with --split-sentences, or train without pairs"
        )
    starts, documents = shards.sentence_starts.tolist(), shards.document_starts.tolist()
    rng = Random(seed)
    builder = _Builder(starts, documents, max_length - 3, task == "sop", short_seq_prob, rng)
    plan = array("q")
    for _ in range(dupe_factor):
        for i in range(len(documents) - 1):
            for item in builder.of_document(i):
                plan.extend(item)
    return np.frombuffer(plan, dtype=np.int64).reshape(-1, 5)


class _Builder:
    """Draws in the order of the reference, so that the same generator gives the same items."""

    def __init__(
        self, starts: list[int], documents: list[int], room: int, order: bool, short_seq_prob: float, rng: Random
    ) -> None:
        self.starts, self.documents, self.room = starts, documents, room
        self.order, self.short_seq_prob, self.rng = order, short_seq_prob, rng

    def of_document(self, document: int) -> list[tuple[int, int, int, int, int]]:
        """Its items."""
        starts, rng = self.starts, self.rng
        first, end = self.documents[document], self.documents[document + 1]
        target = rng.randint(2, self.room) if rng.random() < self.short_seq_prob else self.room
        items, begin = [], first
        while begin < end:
            stop = begin + 1
            while stop < end and starts[stop] - starts[begin] < target:
                stop += 1
            split = begin + (rng.randint(1, stop - begin - 1) if stop - begin > 1 else 1)
            a, b, label = (starts[begin], starts[split]), (starts[split], starts[stop]), 0
            used = stop
            if stop - begin == 1 or (not self.order and rng.random() < 0.5):
                b, label = self._elsewhere(document, target - (a[1] - a[0])), 1
                used = split  # what would have been B comes again
            elif self.order and rng.random() < 0.5:
                a, b, label = b, a, 1
            items.append((*self._truncated(a, b), label))
            begin = used
        return items

    def _elsewhere(self, document: int, target: int) -> Range:
        """Sentences from a random place of a random document, until they have `target` tokens or it ends."""
        other = document
        for _ in range(10):
            other = self.rng.randint(0, len(self.documents) - 2)
            if other != document:
                break
        first, end = self.documents[other], self.documents[other + 1]
        start = first + self.rng.randint(0, end - first - 1)
        stop = start + 1
        while stop < end and self.starts[stop] - self.starts[start] < target:
            stop += 1
        return self.starts[start], self.starts[stop]

    def _truncated(self, a: Range, b: Range) -> tuple[int, int, int, int]:
        (a0, a1), (b0, b1) = a, b
        while (a1 - a0) + (b1 - b0) > self.room:
            front = self.rng.random() < 0.5
            if a1 - a0 > b1 - b0:
                a0, a1 = (a0 + 1, a1) if front else (a0, a1 - 1)
            else:
                b0, b1 = (b0 + 1, b1) if front else (b0, b1 - 1)
        return a0, a1, b0, b1
