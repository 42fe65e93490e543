"""Token scores to entities with character offsets, as the token-classification pipeline of `transformers` does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from fastbert.serve.scores import softmax


@dataclass(frozen=True)
class _Token:
    """One token, or with the word strategies one word: `scores` has a probability a label."""

    scores: np.ndarray
    word: str
    start: int
    end: int
    index: int
    continues: bool


def entities(
    text: str,
    encoding: tokenizers.Encoding,
    logits_LC: np.ndarray,
    tokenizer: tokenizers.Tokenizer,
    id2label: Mapping[int, str],
    strategy: str = "simple",
    ignore_labels: Sequence[str] = ("O",),
) -> list[dict[str, Any]]:
    """Entities of one text.

    Args:
        text: what was encoded; offsets count its characters.
        encoding: its L tokens.
        logits_LC: float32, one row a token, one column a label.
        tokenizer: to write tokens as text again.
        id2label: names of the columns; `B-` and `I-` mark beginnings and continuations.
        strategy: `none`: every token; `simple`: neighbours with one label; `first`, `max`, `average`: the same over
            whole words, whose label its first token, its surest token or the mean of its tokens decides.
        ignore_labels: labels, without the prefix once grouped, that are left out.

    Returns:
        With `none` dicts of entity, score, index, word, start, end; otherwise of entity_group, score, word, start, end.
    """
    tokens = _tokens(text, encoding, softmax(logits_LC), tokenizer)
    to_text = _writer(tokenizer)
    if strategy in ("first", "max", "average"):
        tokens = [_word(group, strategy, to_text) for group in _words(tokens)]
    found = [_labelled(token, id2label) for token in tokens]
    if strategy != "none":
        found = [_group(group, to_text) for group in _neighbours(found)]
    key = "entity" if strategy == "none" else "entity_group"
    return [entity for entity in found if entity[key] not in ignore_labels]


def _tokens(
    text: str, encoding: tokenizers.Encoding, scores_LC: np.ndarray, tokenizer: tokenizers.Tokenizer
) -> list[_Token]:
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    unknown = _unknown_id(tokenizer)
    out = []
    for i, (token, (start, end), special) in enumerate(
        zip(encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
    ):
        if special:
            continue
        surface = text[start:end]
        # A WordPiece with "##" is longer than the characters it stands for; other tokenizers know only spaces.
        continues = len(token) != len(surface) if prefix else start > 0 and " " not in text[start - 1 : start + 1]
        if encoding.ids[i] == unknown:
            token, continues = surface, False
        out.append(_Token(scores_LC[i], token, start, end, i, continues))
    return out


def _unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    token = getattr(tokenizer.model, "unk_token", None)
    return getattr(tokenizer.model, "unk_id", None) if token is None else tokenizer.token_to_id(token)


def _words(tokens: Sequence[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _word(tokens: Sequence[_Token], strategy: str, to_text: Callable[[list[str]], str]) -> _Token:
    if strategy == "first":
        scores = tokens[0].scores
    elif strategy == "max":
        scores = max(tokens, key=lambda token: float(token.scores.max())).scores
    else:
        scores = np.mean([token.scores for token in tokens], axis=0)
    word = to_text([token.word for token in tokens])
    return _Token(scores, word, tokens[0].start, tokens[-1].end, tokens[0].index, False)


def _labelled(token: _Token, id2label: Mapping[int, str]) -> dict[str, Any]:
    best = int(token.scores.argmax())
    return {
        "entity": id2label[best],
        "score": float(token.scores[best]),
        "index": token.index,
        "word": token.word,
        "start": token.start,
        "end": token.end,
    }


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and its name without the prefix."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _neighbours(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = []
    for entity in found:
        begins, tag = _tag(entity["entity"])
        if groups and not begins and tag == _tag(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _group(group: Sequence[dict[str, Any]], to_text: Callable[[list[str]], str]) -> dict[str, Any]:
    return {
        "entity_group": group[0]["entity"].split("-", 1)[-1],
        "score": float(np.mean([entity["score"] for entity in group])),
        "word": to_text([entity["word"] for entity in group]),
        "start": group[0]["start"],
        "end": group[-1]["end"],
    }


def _writer(tokenizer: tokenizers.Tokenizer) -> Callable[[list[str]], str]:
    decoder = tokenizer.decoder
    return " ".join if decoder is None else decoder.decode
