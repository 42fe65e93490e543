"""Metrics of finished predictions: numbers in, one float out. All are fractions, 1 is perfect (correlations: -1 to 1).

Every function takes whole sets of predictions, never averages of batches. An undefined ratio (0 / 0) is 0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

Span = tuple[str, int, int]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_IOB2 = re.compile(r"O|[BI]-.+")
_TAG = re.compile(r"O|[BIESLU]-.+")
_TO_BI = {"E": "I", "L": "I", "S": "B", "U": "B"}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _paired(predicted: np.ndarray, gold: np.ndarray) -> None:
    if predicted.shape != gold.shape:
        raise ValueError(f"predictions have shape {predicted.shape} but labels {gold.shape}")
    if predicted.shape[0] == 0:
        raise ValueError("there are no predictions to measure")


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Share of equal entries of two (N) arrays; of two (N, K) arrays, share of rows that are equal throughout."""
    _paired(predicted, gold)
    equal = predicted == gold
    return float(equal.reshape(len(equal), -1).all(axis=1).mean())


def confusion(predicted: np.ndarray, gold: np.ndarray, num_labels: int) -> np.ndarray:
    """(num_labels, num_labels) counts: row = label, column = prediction."""
    _paired(predicted, gold)
    table = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(table, (gold, predicted), 1)
    return table


def f1_binary(predicted: np.ndarray, gold: np.ndarray, positive: int = 1) -> float:
    """F1 of one class of two (N) arrays: 2 TP / (2 TP + FP + FN)."""
    _paired(predicted, gold)
    hit, found, there = (predicted == positive) & (gold == positive), predicted == positive, gold == positive
    return _ratio(2 * hit.sum(), found.sum() + there.sum())


def f1_macro(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Mean F1 over the classes that occur in either of two (N) integer arrays."""
    classes = np.union1d(predicted, gold)
    return float(np.mean([f1_binary(predicted, gold, int(c)) for c in classes]))


def f1_columns(predicted: np.ndarray, gold: np.ndarray) -> tuple[float, float]:
    """(micro, macro) F1 of two (N, K) bool arrays; macro is over all K columns."""
    _paired(predicted, gold)
    hits, found, there = (predicted & gold).sum(0), predicted.sum(0), gold.sum(0)
    macro = np.mean([_ratio(2 * h, f + t) for h, f, t in zip(hits, found, there, strict=True)])
    return _ratio(2 * hits.sum(), found.sum() + there.sum()), float(macro)


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews correlation of two (N) integer arrays, for any number of classes (Gorodkin 2004, R_K)."""
    classes, codes = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    table = confusion(codes[len(gold) :], codes[: len(gold)], len(classes)).astype(np.float64)
    there, found, total = table.sum(1), table.sum(0), table.sum()
    covariance = np.trace(table) * total - there @ found
    return _ratio(covariance, np.sqrt((total**2 - found @ found) * (total**2 - there @ there)))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation of two (N) arrays, in fp64; 0 where one is constant."""
    _paired(a, b)
    a, b = (x.astype(np.float64) - x.astype(np.float64).mean() for x in (a, b))
    return _ratio(a @ b, np.sqrt((a @ a) * (b @ b)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks of two (N) arrays; equal values share their mean rank."""
    _paired(a, b)
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place]


def retrieval(queries: np.ndarray, documents: np.ndarray, at: int = 10, chunk: int = 1024) -> tuple[float, float]:
    """(accuracy@1, MRR@`at`) where document i is the one right answer to query i.

    Args:
        queries, documents: (N, D) vectors of length 1; documents equal to the right one count as it.
        at: the right answer counts nothing below this rank.
        chunk: queries compared at once, which bounds the memory at chunk * N numbers.
    """
    _paired(queries, documents)
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ documents.T
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))]
        ranks[start : start + chunk] = 1 + (scores > own[:, None] + 1e-6).sum(1)
    return float((ranks == 1).mean()), float(np.where(ranks <= at, 1 / ranks, 0.0).mean())


def is_iob2(labels: Sequence[str]) -> bool:
    """Whether label names are entity tags: `O`, `B-type` and `I-type`, and not `O` alone."""
    return len(set(labels)) > 1 and all(_IOB2.fullmatch(label) for label in labels)


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2, where B- begins every entity: from IOB1 or BIOES / BILOU; IOB2 stays as it is.

    Tags of another form (parts of speech, say) come back unchanged.
    """
    if not all(_TAG.fullmatch(tag) for tag in tags):
        return list(tags)
    out: list[str] = []
    before = "O"
    for tag in tags:
        kind, _, name = tag.partition("-")
        kind = _TO_BI.get(kind, kind)
        if kind == "I" and (before == "O" or before.partition("-")[2] != name or before[0] in "ELSU"):
            kind = "B"
        out.append(f"{kind}-{name}" if name else kind)
        before = tag
    return out


def entities(tags: Sequence[str]) -> set[Span]:
    """Entities of a sentence in IOB2, read strictly: (type, first word, word past the last).

    Only B- begins an entity; an I- that does not continue one of its type is no entity and ends the one before.
    """
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and not (prefix == "I" and name == kind):
            found.add((kind, start, i))
            kind = ""
        if prefix == "B":
            start, kind = i, name
    return found


def entity_scores(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """`precision`, `recall`, `f1` of whole entities over all sentences: type and both ends must agree (CoNLL-2003).

    Raises:
        ValueError: sentences of different lengths.
    """
    hits = found = there = 0
    for i, (ours, theirs) in enumerate(zip(predicted, gold, strict=True)):
        if len(ours) != len(theirs):
            raise ValueError(f"sentence {i} has {len(theirs)} tags but {len(ours)} predictions")
        a, b = entities(ours), entities(theirs)
        hits, found, there = hits + len(a & b), found + len(a), there + len(b)
    return {
        "precision": _ratio(hits, found),
        "recall": _ratio(hits, there),
        "f1": _ratio(2 * hits, found + there),
    }


def normalize_answer(text: str) -> str:
    """As the SQuAD evaluation compares answers: lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction is one of the normalised answers; no answers means "no answer", ""."""
    return float(normalize_answer(predicted) in {normalize_answer(a) for a in answers or [""]})


def word_f1(predicted: str, answers: Sequence[str]) -> float:
    """Greatest F1 of the bags of words of the prediction and an answer (Rajpurkar et al. 2016, sec. 6.1)."""
    return max(_word_f1(normalize_answer(predicted).split(), normalize_answer(a).split()) for a in answers or [""])


def _word_f1(predicted: list[str], answer: list[str]) -> float:
    if not predicted or not answer:
        return float(predicted == answer)
    return _ratio(2 * sum((Counter(predicted) & Counter(answer)).values()), len(predicted) + len(answer))
