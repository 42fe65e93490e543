"""A list of texts as token ids, part by part: a thread tokenises the next part while the caller computes this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

from fastbert.tokenizer import Encoded, Text, Tokenizer

A = TypeVar("A")
B = TypeVar("B")

WINDOW = 16384  # texts a part at most
_BATCHES = 8  # budgets of tokens a part holds at most: what is tokenised and waits stays small
_TOKENS = 2048  # that a part has at least, however small the batches are
_CHARACTERS = 3  # a token, about: English has 3.2 to 3.8
# A list of so many tokens (2.5 ms) is tokenised by its caller alone where the model computes on the CPU, too: OpenMP's
# threads spin for milliseconds after a pass, and those of `tokenizers` wait for them, 4 ms at a time. Two Zen 5 cores,
# 4 and 96 queries in a loop, mean: 1.26 and 1.03 times as fast in bf16, 1.56 and 1.05 in int8 (2026-11-27).
_ALONE = 2048


def ahead(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """`function` of each item, in order; a thread computes the next one meanwhile.

    A single item never leaves the caller's thread. An error comes out in the place of its item.
    """
    if len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1, "fastbert-tokenise") as pool:
        coming = pool.submit(function, items[0])
        for item in items[1:]:
            here = coming.result()
            coming = pool.submit(function, item)
            yield here
        yield coming.result()


def windows(texts: Sequence[Text], max_length: int, budget_tokens: int) -> list[tuple[int, int]]:
    """Bounds (first, last) of the parts of a list: about 1, 2, 4, then 8 budgets of tokens, at most `WINDOW` texts.

    The first part is small, so that its forward pass starts early; later ones fill whole batches better.
    """
    bounds, tokens, batches, least = [0], 0, 1, max(budget_tokens, _TOKENS)
    for i, text in enumerate(texts):
        if i > bounds[-1] and (tokens >= batches * least or i - bounds[-1] == WINDOW):
            bounds.append(i)
            tokens, batches = 0, min(2 * batches, _BATCHES)
        tokens += _num_tokens(text, max_length)
    return list(pairwise([*bounds, len(texts)])) if texts else []


def _num_tokens(text: Text, max_length: int) -> int:
    """About. What is no text is left for the tokenizer to name."""
    parts = (text,) if isinstance(text, str) else text if isinstance(text, (tuple, list)) else ()
    return min(sum(len(part) for part in parts if isinstance(part, str)) // _CHARACTERS + 2, max_length)


def encode_windows(
    tokenizer: Tokenizer, texts: Sequence[Text], prompt: str, budget_tokens: int, on_cpu: bool
) -> Iterator[tuple[int, Encoded]]:
    """(first, token ids of the texts from there on) of each part of a list, `prompt` before each text.

    Args:
        on_cpu: whether the model computes on the CPU: then a short list wakes no threads of `tokenizers`.

    Raises:
        TypeError: an element is neither a str nor a pair of str; its index and type are named.
    """
    parts = windows(texts, tokenizer.max_length, budget_tokens)
    alone = on_cpu and len(parts) == 1 and sum(_num_tokens(text, tokenizer.max_length) for text in texts) <= _ALONE

    def encode(bounds: tuple[int, int]) -> tuple[int, Encoded]:
        part = texts[slice(*bounds)]
        return bounds[0], tokenizer.encode([_prepend(prompt, t) for t in part] if prompt else part, bounds[0], alone)

    yield from ahead(encode, parts)


def _prepend(prompt: str, text: Text) -> Text:
    """A prompt goes before the first text of a pair; what is no text is left for the tokenizer to name."""
    if isinstance(text, str):
        return prompt + text
    if isinstance(text, (tuple, list)) and text and isinstance(text[0], str):
        return (prompt + text[0], *text[1:])
    return text
