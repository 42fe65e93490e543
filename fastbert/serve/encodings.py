"""Tokens with their places in the text, for the routes that answer with them. Tokenising is done in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import tokenizers

from fastbert.tokenizer import Tokenizer


class Encodings:
    """A model's tokenizer, cutting on either side or not at all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        text = tokenizer.backend.to_str()
        self._whole = tokenizers.Tokenizer.from_str(text)
        self._whole.no_truncation()
        self._cut = {side: tokenizers.Tokenizer.from_str(text) for side in ("left", "right")}
        for side, backend in self._cut.items():
            backend.enable_truncation(tokenizer.max_length, direction=side)

    async def whole(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[tokenizers.Encoding]:
        """All tokens of each text."""
        return await asyncio.to_thread(self._whole.encode_batch, texts, add_special_tokens=add_special_tokens)

    async def cut(self, texts: Sequence[str], direction: str) -> list[tokenizers.Encoding]:
        """No more tokens than the model takes; `left` or `right` is the side that goes."""
        return await asyncio.to_thread(self._cut[direction].encode_batch, texts)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids."""
        return self._whole.decode(ids, skip_special_tokens=skip_special_tokens)
