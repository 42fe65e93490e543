"""Tokenizer files to a `tokenizers.Tokenizer`: `tokenizer.json`, or BERT's `vocab.txt`. It sets no truncation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from fastbert.typed import field

_CONFIG = "tokenizer_config.json"
_UNKNOWN = "\ue000"  # a character of private use is in no vocabulary


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a folder; where `config` (tokenizer_config.json) and BERT's normaliser differ, `config` wins.

    Raises:
        FileNotFoundError: neither `tokenizer.json` nor `vocab.txt`.
        ValueError: a corrupt file, or a vocabulary without BERT's special tokens.
    """
    path, vocab = folder / "tokenizer.json", folder / "vocab.txt"
    if not path.is_file() and not vocab.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json (and no vocab.txt to build one from); it holds {found}"
        )
    if not path.is_file():
        return _wordpiece(vocab, config)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.encode(_UNKNOWN)  # some files are read, and fail at the first word that they do not know
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a tokenizer: {error}. Download it again"
        ) from error
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):  # transformers lets the configuration win over the file
        normalizer.lowercase = field(config, "do_lower_case", bool, normalizer.lowercase, _CONFIG)
        if "strip_accents" in config:  # null has a meaning of its own: as do_lower_case says
            normalizer.strip_accents = field(config, "strip_accents", bool, None, _CONFIG)
        chinese = field(config, "tokenize_chinese_chars", bool, normalizer.handle_chinese_chars, _CONFIG)
        normalizer.handle_chinese_chars = chinese
        backend.normalizer = normalizer
    return backend


def _wordpiece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer from its list of tokens, one a line."""
    try:
        vocab = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").split("\n")) if token}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a list of tokens in UTF-8: {error}. Download it again") from error
    names = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    unk, cls, sep, pad, mask = (_content(config.get(name, f"[{name[:-6].upper()}]")) for name in names)
    if missing := [token for token in (unk, cls, sep) if token not in vocab]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is not the vocabulary of a BERT, or its config names others"
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=field(config, "tokenize_chinese_chars", bool, True, _CONFIG),
        strip_accents=field(config, "strip_accents", bool, None, _CONFIG),
        lowercase=field(config, "do_lower_case", bool, True, _CONFIG),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(t, vocab[t]) for t in (cls, sep)],
    )
    backend.add_special_tokens([token for token in (unk, cls, sep, pad, mask) if token in vocab])
    return backend


def _content(token: Any) -> str:
    """A special token in a configuration is a string or an object with its content."""
    return field(token, "content", str, "", _CONFIG) if isinstance(token, Mapping) else str(token)


def lowercase_first(backend: tokenizers.Tokenizer) -> None:
    """Put a lowercase step before the normaliser's others, unless it has one."""
    steps = backend.normalizer
    parts: list[Any] = (
        list(iter(steps)) if isinstance(steps, normalizers.Sequence) else [] if steps is None else [steps]
    )
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
