"""Text to token ids: a thin wrapper over `tokenizers`, with the truncation of one model and never any padding."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from fastbert.tokenizer_files import lowercase_first, read_tokenizer
from fastbert.typed import field
from fastbert.weights import read_json

Text = str | tuple[str, str]

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoded:
    """Token ids of N texts.

    Attributes:
        ids: N lists of ids, special tokens included, none longer than the tokenizer's `max_length`.
        type_ids: N lists of segment ids, or None where no text is a pair (all would be 0).
        truncated: N flags: the text had more tokens than fit.
    """

    ids: list[list[int]]
    type_ids: list[list[int]] | None
    truncated: list[bool]


@dataclass(frozen=True)
class Tokenizer:
    """Texts to ids. Immutable, hence safe to share between threads; `with_max_length` gives a changed copy.

    Attributes:
        backend: the tokenizer proper; its own padding and truncation are replaced.
        max_length: tokens of a text, special tokens included; what is beyond is cut.
        config: content of `tokenizer_config.json`.
    """

    backend: tokenizers.Tokenizer
    max_length: int
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        special = self.backend.num_special_tokens_to_add(is_pair=True)
        if self.max_length < special:
            raise ValueError(f"max_seq_length is {self.max_length}, but a pair of texts has {special} special tokens")
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.no_padding()
        side = field(self.config, "truncation_side", Literal["right", "left"], "right", "tokenizer_config.json")
        backend.enable_truncation(self.max_length, direction=side)
        object.__setattr__(self, "backend", backend)

    @classmethod
    def from_folder(cls, folder: Path, limit: int, max_length: int | None = None, lowercase: bool = False) -> Tokenizer:
        """From `tokenizer.json`, or for BERT's WordPiece from `vocab.txt`; `tokenizer_config.json` is heeded.

        Args:
            folder: where the files are.
            limit: tokens that the model has positions for.
            max_length: None = the smaller of `limit` and the configuration's `model_max_length`.
            lowercase: lower the text first, whatever the tokenizer does (`do_lower_case` of sentence-transformers).

        Raises:
            FileNotFoundError: neither file.
            ValueError: a corrupt file, or a `max_length` above `limit`.
        """
        if max_length is not None and max_length > limit:
            raise ValueError(f"max_seq_length is {max_length} but the model has positions for {limit} tokens")
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        if not isinstance(config.get("model_max_length", 0), (int, float, NoneType)):
            raise ValueError(f"{path}: model_max_length is {config['model_max_length']!r:.80}; it must be a number")
        backend = read_tokenizer(folder, config)
        if lowercase:
            lowercase_first(backend)
        if max_length is None:
            max_length = int(min(config.get("model_max_length") or limit, limit))  # 1e30 means "no limit"
        return cls(backend, max_length, config)

    def with_max_length(self, max_length: int) -> Tokenizer:
        """The same tokenizer with another truncation."""
        return Tokenizer(self.backend, max_length, self.config)

    @property
    def num_ids(self) -> int:
        """One more than the greatest id that can come out."""
        framing = self.backend.encode("", "").ids  # ids of the post-processor's own, whatever the vocabulary says
        return max(*self.backend.get_vocab(with_added_tokens=True).values(), *framing, -1) + 1

    def encode(self, texts: Sequence[Text], first: int = 0, alone: bool = False) -> Encoded:
        """Tokenise texts, or pairs of them. Lone surrogates, which no UTF-8 text holds, are read as U+FFFD.

        Args:
            first: what errors call the first of them, where they are a part of a longer list.
            alone: in the caller's thread only; a list of several wakes the threads of `tokenizers`.

        Raises:
            TypeError: an element is neither a str nor a pair of str; its index and type are named.
            ValueError: the tokenizer's own files contradict each other.
        """
        try:
            inputs = [self.checked(text, i) for i, text in enumerate(texts, first)]
            lists = [[text] for text in inputs] if alone else [inputs]
            encodings = list(chain.from_iterable(map(self.backend.encode_batch_fast, lists)))
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises plain Exception, everything else has a class
                raise
            raise ValueError(f"the tokenizer cannot encode: {error}. Is its tokenizer.json whole?") from error
        pairs = any(not isinstance(text, str) for text in texts)
        return Encoded(
            [e.ids for e in encodings],
            [e.type_ids for e in encodings] if pairs else None,
            [bool(e.overflowing) for e in encodings],
        )

    def checked(self, text: Text, index: int = 0) -> Text:
        """A text or pair as it is tokenised: without lone surrogates, and without an end that truncation cuts anyway.

        Raises:
            TypeError: it is neither a str nor a pair of str; `index` is its place in the message.
        """
        if isinstance(text, str):
            return self._head(_SURROGATES.sub("\ufffd", text))
        if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
            a, b = (_SURROGATES.sub("\ufffd", part) for part in text)
            # Of a pair the longer text is cut first. No text has more than four tokens a character (a letter's
            # decomposition): so the other one stays the shorter, however much of the longer one is left out.
            short = 4 * min(len(a), len(b)) < self.max_length - 1
            return (a, b) if not short else (a, self._head(b)) if len(a) < len(b) else (self._head(a), b)
        raise TypeError(f"texts[{index}] must be a str or a pair of str, it is a {type(text).__name__}: {text!r:.80}")

    def _head(self, text: str) -> str:
        """A prefix that has the same first `max_length` tokens and is truncated too, or the text itself.

        BERT's words are found from left to right, each by itself. So a cut changes at most the word it falls into and
        those that a special token written out in the text, such as "[SEP]", may have begun: words before are as in
        the whole text. A text of a megabyte costs as much as one of a few thousand characters.
        """
        cut = 16 * self.max_length
        if len(text) <= 2 * cut or not self._reads_word_by_word():
            return text
        head = self.backend.encode(text[:cut])  # the fast call knows no words
        if not head.overflowing:
            return text
        kept = max((w for w in head.word_ids if w is not None), default=-1)
        found = max((w for rest in head.overflowing for w in rest.word_ids if w is not None), default=-1)
        longest = max((len(t.content) for t in self.backend.get_added_tokens_decoder().values()), default=0)
        return text[:cut] if found - kept > 2 * longest + 2 else text

    def _reads_word_by_word(self) -> bool:
        return (
            isinstance(self.backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
            and isinstance(self.backend.normalizer, normalizers.BertNormalizer)
            and self.config.get("truncation_side", "right") == "right"
        )

    def prompt_length(self, prompt: str) -> int:
        """Leading tokens that a prompt takes: its tokens with the special ones, without a special one at the end."""
        ids = self.encode([prompt]).ids[0]
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return len(ids) - (bool(ids) and ids[-1] in special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        self.backend.save(str(folder / "tokenizer.json"))
        config = {**self.config, "model_max_length": self.max_length}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
