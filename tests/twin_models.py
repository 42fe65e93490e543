"""Small models in our class and in Hugging Face's, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import fastbert

V = 60
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.1, **OFF,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": V, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40,
    "initializer_range": 0.1, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
ALBERT = SMALL | {"embedding_size": 20, "classifier_dropout_prob": 0.0, "hidden_act": "gelu_new"}
ELECTRA = SMALL | {"embedding_size": 20}


def same(name: str, config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    """Our class and theirs with the same weights, no two of them alike."""
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)(getattr(transformers, f"{name.split('For')[0]}Config")(**config))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if key.lower().endswith("norm.weight") else 0.0, 0.1)
    theirs = theirs.to(dtype).train()
    ours = getattr(fastbert, name)(getattr(fastbert, f"{name.split('For')[0]}Config").from_dict(config)).to(dtype)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
    return ours.train(), theirs
