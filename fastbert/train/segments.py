"""Items of one segment: stretches of documents, or of the whole corpus, that fill a sequence. Ranges of tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.tokenizer import Tokenizer
from fastbert.train.shards import Shards


@dataclass(frozen=True)
class Frame:
    """The special tokens around a sequence: `first` A `last`, or `first` A `last` B `last`."""

    first: int
    last: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame:
        """Of a tokenizer that puts one special token before a text and one behind it.

        Raises:
            ValueError: it does something else.
        """
        ids = tokenizer.backend.encode("").ids
        if len(ids) != 2:
            raise ValueError(
                f"the tokenizer puts {len(ids)} special tokens around a text; pretraining needs one before it and one "
                "behind, such as [CLS] and [SEP]"
            )
        return cls(*ids)


class Segments:
    """Items of one segment each: a dataset for `Loader`.

    Consecutive whole sentences are taken while they fit into `max_length` tokens with the special ones; a sentence that
    is longer is cut. Nothing is left out, nothing occurs twice.

    Args:
        shards: where the tokens are.
        frame: special tokens.
        max_length: tokens an item at most, special ones included.
        across: go on over ends of documents, with a separator there (FULL-SENTENCES of RoBERTa, Liu et al. 2019,
            arXiv 1907.11692, sec. 4.2); False ends the item there (DOC-SENTENCES).

    Attributes:
        ranges: (N, 2) int64 first token of each item, and the one behind its last.
        lengths: (N) int64 tokens, special ones included.

    Raises:
        ValueError: `max_length` leaves no room for a token.
    """

    def __init__(self, shards: Shards, frame: Frame, max_length: int, across: bool = False) -> None:
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}: two special tokens and one of the text need 3")
        self.shards, self.frame = shards, frame
        self._documents = shards.sentence_starts[shards.document_starts]  # first token of each; the last is the end
        units = _cut(shards.sentence_starts, max_length - 2)
        self.ranges = _fill(units, self._documents, max_length - 2, across)
        begin, end = self.ranges.T
        self._inner = self._separators(begin, end) if across else np.zeros(len(self.ranges), np.int64)
        self.lengths: np.ndarray = end - begin + self._inner + 2

    def _separators(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Ends of documents strictly inside of ranges."""
        left = np.searchsorted(self._documents, begin, side="right")
        return np.searchsorted(self._documents, end, side="left") - left

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """`input_ids` of item `i`."""
        begin, end = map(int, self.ranges[i])
        first = int(np.searchsorted(self._documents, begin, side="right"))
        cuts = self._documents[first : first + int(self._inner[i])].tolist()
        ids = [self.frame.first]
        for start, stop in zip([begin, *cuts], [*cuts, end], strict=True):
            ids += [*self.shards.tokens(start, stop).tolist(), self.frame.last]
        return {"input_ids": ids}


def _cut(starts: np.ndarray, room: int) -> np.ndarray:
    """Starts of sentences, and starts inside of those that are longer than `room`."""
    sizes = np.diff(starts)
    more = [np.arange(starts[i] + room, starts[i + 1], room) for i in np.flatnonzero(sizes > room)]
    return np.sort(np.concatenate([starts, *more])) if more else np.asarray(starts)


def _fill(units: np.ndarray, documents: np.ndarray, room: int, across: bool) -> np.ndarray:
    """(N, 2) ranges of whole units, as long as fit."""
    if across:
        # The separators before a unit that begins an item, and before one that ends it: the own document's counts
        # only where the item begins.
        before = units + np.searchsorted(documents, units, side="right")
        until = units + np.searchsorted(documents, units, side="left")
        last = np.full(len(units), len(units) - 1)
    else:
        before = until = units
        ends = documents[np.searchsorted(documents, units, side="right").clip(max=len(documents) - 1)]
        last = np.searchsorted(units, ends)
    reach = np.searchsorted(until, before + room, side="right") - 1
    reach = np.minimum(reach, last).tolist()
    stops: Sequence[int] = reach
    bounds, i = [], 0
    while i < len(units) - 1:
        bounds.append((i, stops[i]))
        i = stops[i]
    return units[np.asarray(bounds, dtype=np.int64)]
