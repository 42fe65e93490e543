"""New models: the configuration of a family in one of the usual sizes, for a tokenizer."""

from __future__ import annotations

from typing import Any

from fastbert.models.auto import AutoModel
from fastbert.models.config import Config
from fastbert.tokenizer import Tokenizer
from fastbert.train.vocabulary import BERT_TOKENS, ROBERTA_TOKENS, Kind, SpecialTokens

# (layers, hidden size): Turc et al. 2019, arXiv 1908.08962, and Devlin et al. 2018.
SHAPES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
ELECTRA_SMALL = (12, 256)  # Clark et al. 2020, table 6
EMBEDDING_SIZE = 128  # of ALBERT, and of ELECTRA up to small
LEAST_POSITIONS = 512  # so that a later phase may use longer sequences


def vocabulary_kind(model_type: str) -> tuple[Kind, SpecialTokens]:
    """What kind of vocabulary a family has, and the names of its special tokens."""
    if model_type == "roberta":
        return "bpe", ROBERTA_TOKENS
    return "wordpiece", ROBERTA_TOKENS if model_type == "mpnet" else BERT_TOKENS


def build_config(
    model_type: str,
    size: str,
    tokenizer: Tokenizer,
    seq_length: int,
    dropout: float | None = None,
    initializer_range: float | None = None,
) -> Config:
    """The configuration of a new model.

    Heads have 64 features, the feed-forward layer 4 times the hidden size. ELECTRA-small is the paper's; a DistilBERT
    has half the layers of a BERT of its size.

    Args:
        model_type: as in `PretrainArguments`.
        size: of `SHAPES`.
        tokenizer: says how many ids there are, and which one pads.
        seq_length: positions there must be; there are at least 512.
        dropout: of hidden states and attention probabilities; None = the family's.
        initializer_range: standard deviation of new weights; None = the family's.

    Raises:
        ValueError: the tokenizer's padding token is not the one from which the family counts positions.
    """
    layers, hidden = ELECTRA_SMALL if (model_type, size) == ("electra", "small") else SHAPES[size]
    pad = pad_id(tokenizer)
    fields: dict[str, Any] = {"vocab_size": tokenizer.num_ids, "pad_token_id": pad}
    positions = max(seq_length, LEAST_POSITIONS)
    if model_type == "distilbert":
        fields |= {"n_layers": max(1, layers // 2), "dim": hidden, "n_heads": hidden // 64, "hidden_dim": 4 * hidden}
    else:
        fields |= {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
        fields |= {"num_attention_heads": hidden // 64}
    if model_type in ("roberta", "mpnet"):
        if pad is None or (model_type == "mpnet" and pad != 1):
            wanted = "with id 1" if model_type == "mpnet" else "to count positions from"
            raise ValueError(f"{model_type} needs a padding token {wanted}, but the tokenizer's has id {pad}")
        positions += pad + 1
        fields |= {"layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2}
    if model_type == "roberta":
        fields["type_vocab_size"] = 1
    if model_type == "albert":
        fields |= {"embedding_size": EMBEDDING_SIZE}
    if model_type == "electra":
        fields |= {"embedding_size": hidden if size in ("base", "large") else EMBEDDING_SIZE}
    if dropout is not None:
        distil = model_type == "distilbert"
        names = ("dropout", "attention_dropout") if distil else ("hidden_dropout_prob", "attention_probs_dropout_prob")
        fields |= dict.fromkeys(names, dropout)
    if initializer_range is not None:
        fields["initializer_range"] = initializer_range
    config_class = AutoModel.class_of(model_type).config_class
    return config_class.from_dict({**fields, "max_position_embeddings": positions})


def pad_id(tokenizer: Tokenizer) -> int | None:
    """Id of the tokenizer's padding token, if it has one."""
    named = tokenizer.config.get("pad_token")
    names = ("[PAD]", "<pad>") if named is None else (named["content"] if isinstance(named, dict) else str(named),)
    return next((i for i in map(tokenizer.backend.token_to_id, names) if i is not None), None)
