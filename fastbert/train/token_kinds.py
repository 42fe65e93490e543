"""What masking must know of a vocabulary: which ids are special, which continue a word, which one is the mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastbert.tokenizer import Tokenizer

Tensor = torch.Tensor

MASKS = ("[MASK]", "<mask>")
SPACE = "\u2581"  # SentencePiece's sign for the space before a word
BYTE_SPACES = tuple("ĠĊĉč")  # space, line feed, tab and carriage return as byte-level BPE writes them


@dataclass(frozen=True)
class TokenKinds:
    """Tables over a vocabulary.

    Attributes:
        mask_id: id of [MASK].
        special: (V) bool; ids that are neither masked nor put in for others: special tokens, and ids without a token.
        ordinary: all other ids.
        continuation: (V) bool; ids of pieces that continue the word before them; None where the vocabulary is mute.
    """

    mask_id: int
    special: Tensor
    ordinary: Tensor
    continuation: Tensor | None = None

    @classmethod
    def of(cls, mask_id: int, special: Tensor, continuation: Tensor | None = None) -> TokenKinds:
        """From a table of special ids.

        Raises:
            ValueError: nothing but special ids, or a mask that is none of them.
        """
        if not 0 <= mask_id < special.numel() or not special[mask_id]:
            raise ValueError(f"mask_id {mask_id} must be one of the special ids of {special.numel()}")
        if bool(special.all()):
            raise ValueError(f"all {special.numel()} ids are special: there is nothing to mask")
        return cls(mask_id, special, (~special).nonzero().flatten(), continuation)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> TokenKinds:
        """Of a tokenizer with a mask token.

        Raises:
            ValueError: the tokenizer has no mask token.
        """
        backend = tokenizer.backend
        named = tokenizer.config.get("mask_token")
        names = MASKS if named is None else (named["content"] if isinstance(named, Mapping) else str(named),)
        found = [i for i in map(backend.token_to_id, names) if i is not None]
        if not found:
            raise ValueError(
                f"the tokenizer has no mask token (looked for {', '.join(names)}), but masked language modelling needs "
                "one: name it as mask_token in tokenizer_config.json"
            )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = torch.ones(tokenizer.num_ids, dtype=torch.bool)
        special[list(vocabulary.values())] = False
        special[[i for i, token in backend.get_added_tokens_decoder().items() if token.special]] = True
        special[found[0]] = True
        return cls.of(found[0], special, continuation_table(vocabulary, json.loads(backend.to_str())["model"]))

    def to(self, device: torch.device | str) -> TokenKinds:
        """The same tables on another device."""
        continuation = None if self.continuation is None else self.continuation.to(device)
        return TokenKinds(self.mask_id, self.special.to(device), self.ordinary.to(device), continuation)


def continuation_table(vocabulary: Mapping[str, int], model: Mapping[str, Any]) -> Tensor | None:
    """(V) bool: which pieces continue a word, by the convention that the vocabulary follows.

    WordPiece marks continuations ("##ing"), SentencePiece ("\u2581the") and byte-level BPE ("Ġthe") mark words that
    follow a space. In the last two a comma belongs to the word it follows, as in fairseq's whole-word masking.

    Args:
        vocabulary: piece -> id.
        model: the `model` of a `tokenizer.json`.

    Returns:
        None where the pieces tell nothing of words, such as BPE with a suffix at the end of words.
    """
    size = max(vocabulary.values()) + 1
    table = torch.zeros(size, dtype=torch.bool)
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        continues = [i for piece, i in vocabulary.items() if piece.startswith(prefix) and piece != prefix]
    elif model.get("type") == "WordLevel":
        continues = []
    else:
        starts = next((s for s in ((SPACE,), BYTE_SPACES) if any(piece.startswith(s[0]) for piece in vocabulary)), None)
        if starts is None or model.get("end_of_word_suffix"):
            return None
        continues = [i for piece, i in vocabulary.items() if not piece.startswith(starts)]
    table[continues] = True
    return table
