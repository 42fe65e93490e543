"""What is read out of a model's numbers: probabilities, ranks, sparse terms, words for a mask, unit vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch

from fastbert.ops import l2_normalize


def normalize(vectors_SD: np.ndarray) -> np.ndarray:
    """Vectors of length 1: the very function of `Embedder.encode`, so that the bits are the same."""
    return l2_normalize(torch.from_numpy(vectors_SD)).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; the greatest logit is subtracted first, so that nothing overflows."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow on either side."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(logits.dtype)


def probabilities(logits_C: np.ndarray, function: str | None = None) -> np.ndarray:
    """Scores of labels: by default softmax over several labels and the sigmoid of a single one, as TEI has it.

    Args:
        logits_C: float32.
        function: `softmax`, `sigmoid`, `none` = the logits, or None = the default.
    """
    function = function or ("softmax" if len(logits_C) > 1 else "sigmoid")
    return logits_C if function == "none" else softmax(logits_C) if function == "softmax" else sigmoid(logits_C)


def descending(scores: np.ndarray) -> np.ndarray:
    """Indices from the greatest score to the least; of equal ones the last comes first, as in TEI."""
    return np.argsort(scores, kind="stable")[::-1]


def predictions(scores_C: np.ndarray, id2label: Mapping[int, str]) -> list[dict[str, Any]]:
    """`[{"score", "label"}, ...]`, the best first."""
    return [{"score": scores_C[i], "label": id2label[int(i)]} for i in descending(scores_C)]


def sparse_terms(weights_V: np.ndarray) -> list[dict[str, Any]]:
    """`[{"index", "value"}, ...]` of what is not zero, by index."""
    return [{"index": int(i), "value": weights_V[i]} for i in np.flatnonzero(weights_V)]


def mask_words(
    ids: Sequence[int],
    mask_id: int,
    logits_MV: np.ndarray,
    tokenizer: tokenizers.Tokenizer,
    top_k: int,
    target_ids: Sequence[int] | None = None,
) -> list[list[dict[str, Any]]]:
    """For each mask of a text the words that fit best, as the Hugging Face fill-mask pipeline lists them.

    Args:
        ids: tokens of the text, its masks too.
        mask_id: the mask's id.
        logits_MV: float32, a row for each mask.
        tokenizer: to write ids as text.
        top_k: words a mask.
        target_ids: words to choose from; None = the whole vocabulary.
    """
    places = [i for i, token in enumerate(ids) if token == mask_id]
    out = []
    for place, scores in zip(places, softmax(logits_MV), strict=True):
        candidates = np.arange(len(scores)) if target_ids is None else np.asarray(target_ids)
        chosen = scores[candidates]
        k = min(top_k, len(candidates))
        best = np.argpartition(-chosen, k - 1)[:k]
        best = best[np.lexsort((best, -chosen[best]))]
        row = []
        for token in candidates[best].tolist():
            filled = [*ids[:place], token, *ids[place + 1 :]]
            # With several masks the others stay visible.
            sequence = tokenizer.decode(filled, skip_special_tokens=len(places) == 1)
            word = tokenizer.decode([token], skip_special_tokens=False)
            row.append({"score": scores[token], "token": token, "token_str": word, "sequence": sequence})
        out.append(row)
    return out


def target_ids(words: Sequence[str], tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Ids of words to choose from; of a word that is no single token, its first token.

    Raises:
        ValueError: no word has a token.
    """
    found: list[int] = []
    for word in words:
        token = tokenizer.token_to_id(word)
        if token is None:
            token = next(iter(tokenizer.encode(word, add_special_tokens=False).ids), None)
        if token is not None and token not in found:
            found.append(token)
    if not found:
        raise ValueError(f"none of the targets {list(words)!r:.80} has a token in the vocabulary")
    return found
