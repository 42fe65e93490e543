"""Small models of every family and size on the CPU engine, and what it owes for each."""

from __future__ import annotations

import copy

import torch

import fastbert
from fastbert import use_backend
from fastbert.models.encoder import EncoderModel
from fastbert.packing import PackedBatch, pack
from fastbert.testing import assert_within_budget

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 700,
    "initializer_range": 0.1,
}


DISTILBERT = {
    "vocab_size": 97,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 700,
    "initializer_range": 0.1,
}


MODELS = {
    "bert": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL)),
    "bert-tanh": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "gelu_new"})),
    "bert-relu": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "relu"})),
    "bert-silu": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "silu"})),
    "bert-linear": lambda: fastbert.BertModel(fastbert.BertConfig(**SMALL | {"hidden_act": "linear"})),
    "roberta": lambda: fastbert.RobertaModel(fastbert.RobertaConfig(**SMALL, type_vocab_size=1, layer_norm_eps=1e-5)),
    "distilbert": lambda: fastbert.DistilBertModel(fastbert.DistilBertConfig(**DISTILBERT)),
    "electra": lambda: fastbert.ElectraModel(fastbert.ElectraConfig(**SMALL, embedding_size=20)),
    "electra-square": lambda: fastbert.ElectraModel(fastbert.ElectraConfig(**SMALL, embedding_size=48)),
    "albert": lambda: fastbert.AlbertModel(fastbert.AlbertConfig(**SMALL, embedding_size=100)),
    "albert-groups": lambda: fastbert.AlbertModel(
        fastbert.AlbertConfig(**SMALL, embedding_size=20, num_hidden_groups=2, inner_group_num=2)
    ),
    "mpnet": lambda: fastbert.MPNetModel(fastbert.MPNetConfig(**SMALL, layer_norm_eps=1e-5)),
    # Sizes: heads of 5 (and an odd depth), one head, heads of 64, several depth blocks, a ragged last block.
    "heads-of-5": lambda: _sized(15, 3, 33),
    "one-head": lambda: _sized(36, 1, 100),
    "heads-of-64": lambda: _sized(128, 2, 300),
    "deep": lambda: _sized(400, 5, 801),
}


SENTENCES = [
    "The committee will publish its final report in the first week of May.",
    "She repaired the old radio with parts from a broken clock.",
    "Rain is expected in the north, with strong winds along the coast.",
    "How do I reset the password of my account?",
    "The enzyme loses its activity at temperatures above forty degrees.",
    "Profits fell by a third after the company lost its largest customer.",
    "Children under twelve travel free when they are accompanied by an adult.",
    "The painting was sold to a museum in Vienna shortly before the war.",
]


HALF_PRODUCTS = ("avx512bf16", "amx", "amxemulated")  # multiply bf16


LENGTHS = [5, 1, 0, 24, 7, 33, 16, 17, 70]


def _sized(hidden: int, heads: int, inner: int) -> EncoderModel:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner, "num_hidden_layers": 2}
    return fastbert.BertModel(fastbert.BertConfig(**SMALL | sizes))


def build(name: str, seed: int = 0) -> EncoderModel:
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # zeros and ones hide swapped biases and norms
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in key.lower():
                parameter.normal_(1, 0.1)
    return model.eval()


def batch_of(model: EncoderModel, lengths: list[int] = LENGTHS, seed: int = 0) -> PackedBatch:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 97, (n,), generator=g).tolist() for n in lengths]
    table = model.embeddings.token_type_embeddings
    types = None
    if table is not None and table.num_embeddings > 1:
        types = [torch.randint(0, 2, (n,), generator=g).tolist() for n in lengths]
    return pack(ids, types, model.position_offset)


@torch.no_grad()
def engine_run(model: EncoderModel, batch: PackedBatch) -> torch.Tensor:
    """What the model's engine computes, sure that there is one."""
    assert model.execution_plan().startswith("cpu engine: "), model.execution_plan()
    return model.forward_packed(batch)


@torch.no_grad()
def assert_engine_within_budget(model: EncoderModel, batch: PackedBatch) -> None:
    ours = engine_run(model, batch)
    with use_backend("reference"):
        same = model.forward_packed(batch)
        exact = copy.deepcopy(model).double().forward_packed(batch)
    assert_within_budget(ours, same, exact)


@torch.no_grad()
def plan_of(model: EncoderModel) -> str:
    return model.execution_plan()
