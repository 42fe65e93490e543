"""Texts that are cut otherwise than the tokenizer is set: to another length, at the other end, or not at all."""

from __future__ import annotations

import tokenizers

from fastbert.tokenizer import Text, Tokenizer

_COUNTED = 1_000_000  # characters of a text that are tokenised only to say how many tokens it has


class Cutter:
    """A tokenizer with a limit and a side of one's own for each text. Safe to share between threads.

    It cuts as `tokenizers` does: of a pair the longer text first, then both.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.no_truncation()

    def encode(self, text: Text, max_length: int, side: str) -> tuple[list[int], list[int], bool]:
        """Ids, segment ids, and whether it was cut; special tokens count and stay.

        Args:
            max_length: tokens at most; no more than the tokenizer's own.
            side: `right` or `left`: the end that goes.

        Raises:
            ValueError: a length that has no room for the special tokens.
        """
        if side == "right":
            text = self.tokenizer.checked(text)  # leaves out what is far behind the limit
        parts = [
            self._backend.encode(_clean(part), add_special_tokens=False)
            for part in ((text,) if isinstance(text, str) else text)
        ]
        room = max_length - self._backend.num_special_tokens_to_add(is_pair=len(parts) == 2)
        if room < 0:
            raise ValueError(f"max_length is {max_length}, but there are {max_length - room} special tokens")
        lengths = [len(part) for part in parts]
        cut = sum(lengths) > room
        if cut:
            for part, length in zip(parts, _lengths(lengths, room), strict=True):
                part.truncate(length, direction=side)
        encoding = self._backend.post_process(parts[0], parts[1] if len(parts) == 2 else None)
        return encoding.ids, encoding.type_ids, cut

    def count(self, text: Text) -> tuple[int, bool]:
        """Tokens of a whole text or pair, special ones included, and whether that is exact: a huge one has more."""
        parts = (text,) if isinstance(text, str) else text
        heads = [_clean(part[:_COUNTED]) for part in parts]
        special = self._backend.num_special_tokens_to_add(is_pair=len(parts) == 2)
        tokens = sum(len(self._backend.encode(head, add_special_tokens=False)) for head in heads)
        return tokens + special, max(map(len, parts)) <= _COUNTED


def _clean(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lengths(lengths: list[int], room: int) -> list[int]:
    """What is left of each text: `tokenizers`' rule `longest_first`."""
    if len(lengths) == 1:
        return [room]
    short, long = sorted(lengths)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [long, short] if lengths[0] > lengths[1] else [short, long]
