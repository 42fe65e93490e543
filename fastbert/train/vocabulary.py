"""Training a vocabulary: BERT's WordPiece, or RoBERTa's byte-level BPE, in the files that all loaders read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastbert.corpus import CorpusError
from fastbert.tokenizer import Tokenizer
from fastbert.train.documents import Texts

Kind = Literal["wordpiece", "bpe"]


@dataclass(frozen=True)
class SpecialTokens:
    """Names of special tokens; their ids are 0, 1, 2 ... in the order of `all`."""

    cls: str
    sep: str
    pad: str
    unk: str
    mask: str
    all: tuple[str, ...]


BERT_TOKENS = SpecialTokens(
    "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
)
ROBERTA_TOKENS = SpecialTokens("<s>", "</s>", "<pad>", "<unk>", "<mask>", ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))


def train_vocabulary(
    texts: Iterable[str],
    size: int,
    kind: Kind = "wordpiece",
    lowercase: bool = True,
    special: SpecialTokens | None = None,
    max_length: int = 512,
    min_frequency: int = 2,
) -> Tokenizer:
    """A tokenizer whose vocabulary is learnt from texts; the same texts give the same one.

    Args:
        texts: sentences or documents; read twice, so no iterator.
        size: ids, special tokens included. A small text may give fewer.
        kind: `wordpiece`: BERT's normalisation, words cut at spaces and punctuation, pieces marked `##`; `bpe`: bytes,
            merged (Radford et al. 2019), so that no text has unknown tokens.
        lowercase: `wordpiece`: lower the text and strip accents ("uncased"). BPE never does.
        special: names of special tokens; None = BERT's or RoBERTa's, as the kind says.
        max_length: tokens of a text, special ones included, that the model has positions for.
        min_frequency: a piece must occur so often.

    Raises:
        ValueError: an unknown kind, or a size that special tokens and single characters exceed.
        TypeError: an iterator, which can be read only once.
        CorpusError: no text.
    """
    if kind not in ("wordpiece", "bpe"):
        raise ValueError(f"kind is {kind!r}; it must be wordpiece or bpe")
    if iter(texts) is texts:
        raise TypeError("texts are read twice, but an iterator can be read once: pass a list, or `Texts`")
    special = special or (BERT_TOKENS if kind == "wordpiece" else ROBERTA_TOKENS)
    learn = _wordpiece if kind == "wordpiece" else _bpe
    backend = learn(texts, size, lowercase, special, min_frequency)
    ids = backend.get_vocab()
    cls, sep = ((token, ids[token]) for token in (special.cls, special.sep))
    if special == BERT_TOKENS:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls[0]} $A {sep[0]}", pair=f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1", special_tokens=[cls, sep]
        )
    else:
        backend.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=False)
    return Tokenizer(backend, max_length, _config(kind, lowercase, special))


def _wordpiece(
    texts: Iterable[str], size: int, lowercase: bool, special: SpecialTokens, min_frequency: int
) -> tokenizers.Tokenizer:
    """The trainer numbers `##x` in the order of a hash table, which changes from run to run and decides between pairs
    that are equally frequent. So it is given all single characters, sorted, as special tokens, and only the vocabulary
    that comes out is kept.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    alphabet = _alphabet(texts, normalizer, size - len(special.all))
    singles = [piece for c in alphabet for piece in (c, f"##{c}")]
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token=special.unk))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*special.all, *singles],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    backend = tokenizers.Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=special.unk))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(special.all))
    return backend


def _alphabet(texts: Iterable[str], normalizer: normalizers.BertNormalizer, room: int) -> list[str]:
    """The most frequent characters, at most 1000 and half of `room`: each is a piece alone and inside of a word."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    found = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    if not found:
        raise CorpusError(_no_text(texts))
    ascii_ = sum(c.isascii() for c in found)
    if room < 2 * ascii_:
        raise ValueError(
            f"the vocabulary has room for {room} pieces beside its special tokens, but the texts have {ascii_} ASCII "
            f"characters, each alone and inside of words: its size must be {2 * ascii_ - room} larger, and better more"
        )
    return sorted(found[: min(1000, room // 2)])


def _no_text(texts: Iterable[str]) -> str:
    return f"{texts if isinstance(texts, Texts) else 'the texts'}: no text to learn a vocabulary from"


def _bpe(
    texts: Iterable[str], size: int, lowercase: bool, special: SpecialTokens, min_frequency: int
) -> tokenizers.Tokenizer:
    if size < len(special.all) + 256:
        raise ValueError(f"a bpe vocabulary has {len(special.all)} special tokens and 256 bytes, got size {size}")
    if not any(text.strip() for text in texts):
        raise CorpusError(_no_text(texts))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[
            tokenizers.AddedToken(token, lstrip=token == special.mask, normalized=False, special=True)
            for token in special.all
        ],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _config(kind: Kind, lowercase: bool, special: SpecialTokens) -> dict[str, Any]:
    """`tokenizer_config.json` as `transformers` reads it."""
    names = {f"{name}_token": getattr(special, name) for name in ("cls", "sep", "pad", "unk", "mask")}
    if kind == "bpe":
        return {
            "tokenizer_class": "RobertaTokenizer",
            "bos_token": special.cls,
            "eos_token": special.sep,
            "add_prefix_space": False,
            "trim_offsets": True,
            **names,
        }
    own = "BertTokenizer" if special == BERT_TOKENS else "PreTrainedTokenizerFast"
    return {"tokenizer_class": own, "do_lower_case": lowercase, **names}
