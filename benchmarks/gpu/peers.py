"""BERT as others compute it, with our weights: transformers where it is installed, and plain torch, which always is."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.attention import varlen
from benchmarks.gpu.report import Run, Setting
from fastbert import BertConfig, BertModel
from fastbert.packing import PackedBatch

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


class Attend(Protocol):
    """(..., 3, H, K) -> (..., H, K)."""

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor: ...


def plain_encoder(
    model: BertModel, ids: torch.Tensor, positions: torch.Tensor, attend: Attend, dropout: float = 0.0
) -> torch.Tensor:
    """Ids (..., L) -> hidden states (..., L, D): the layers in torch's own functions, one GEMM for q, k and v."""
    table, H = model.embeddings, model.config.num_attention_heads

    def norm(x: torch.Tensor, weights: nn.LayerNorm) -> torch.Tensor:
        return F.layer_norm(x, weights.normalized_shape, weights.weight, weights.bias, weights.eps)

    assert table.token_type_embeddings is not None
    x = table.word_embeddings(ids) + table.position_embeddings(positions) + table.token_type_embeddings.weight[0]
    x = F.dropout(norm(x, table.LayerNorm), dropout)
    for layer in model.encoder.layer:
        qkv = layer.attention.qkv(x)
        context = attend(qkv.view(*qkv.shape[:-1], 3, H, -1)).flatten(-2)
        x = norm(x + F.dropout(layer.attention.dense(context), dropout), layer.attention_LayerNorm)
        inner = F.gelu(layer.feed_forward.intermediate(x))
        x = norm(x + F.dropout(layer.feed_forward.output(inner), dropout), layer.output_LayerNorm)
    return x


def sdpa(mask: torch.Tensor | None, dropout: float, qkv: torch.Tensor) -> torch.Tensor:
    """(B, L, 3, H, K) -> (B, L, H, K), as transformers calls it."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def padded(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids (B, L), which are tokens (B, L), and the mask that attention takes (B, 1, 1, L), None where all are."""
    rows = batch.split(batch.input_ids)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    keep = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).bool()
    return ids, keep, None if bool(keep.all()) else keep[:, None, None]


def peers(model: BertModel, theirs: Any, batch: PackedBatch) -> dict[str, Run]:
    """What runs eagerly."""
    ids, keep, mask = padded(batch)
    columns = torch.arange(ids.shape[1], device=ids.device)
    attend = partial(varlen, cu=batch.cu_seqlens, length=batch.max_seqlen)
    runs: dict[str, Run] = {
        "torch sdpa padded": lambda: plain_encoder(model, ids, columns, partial(sdpa, mask, 0.0))[keep],
        "torch packed varlen_attn": lambda: plain_encoder(model, batch.input_ids, batch.position_ids, attend),
    }
    if theirs is not None:
        whole = keep.long()
        runs["hf sdpa padded"] = lambda: theirs(ids, attention_mask=whole).last_hidden_state[keep]
        runs["hf packed varlen_attn"] = partial(packed_hugging_face, theirs, batch)
    return runs


def compiled_peers(model: BertModel, theirs: Any, at: Setting, batch: PackedBatch) -> dict[str, Run]:
    """The padded ones under torch.compile, tuned as far as it goes."""
    ids, keep, mask = padded(batch)
    columns = torch.arange(ids.shape[1], device=ids.device)
    plain: Any = partial(plain_encoder, model)
    if not at.dry:
        plain = torch.compile(plain, mode="max-autotune")
        theirs = None if theirs is None else torch.compile(theirs, mode="max-autotune")
    runs: dict[str, Run] = {"torch.compile padded": lambda: plain(ids, columns, partial(sdpa, mask, 0.0))[keep]}
    if theirs is not None:
        whole = keep.long()
        runs["hf torch.compile padded"] = lambda: theirs(ids, attention_mask=whole).last_hidden_state[keep]
    return runs


def hugging_face(model: BertModel, at: Setting) -> Any:
    """transformers' BERT with the same weights, or None, and said, where transformers is missing."""
    try:
        import transformers
    except ImportError as error:
        print(f"peers of transformers are missing: {error}")
        return None
    config = transformers.BertConfig(**{k: getattr(model.config, k) for k in SIZES})
    config._attn_implementation = "sdpa"
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict({k: v.cpu().float() for k, v in model.state_dict().items()})
    return theirs.to(at.device, at.dtype)


def hugging_face_mlm(config: BertConfig, at: Setting) -> Any:
    """transformers' masked LM in training mode, or None, and said, where transformers is missing."""
    try:
        import transformers
    except ImportError as error:
        print(f"training: transformers is missing: {error}")
        return None
    return (
        transformers.BertForMaskedLM(transformers.BertConfig(**{k: getattr(config, k) for k in SIZES}))
        .train()
        .to(at.device)
    )


def packed_hugging_face(theirs: Any, batch: PackedBatch) -> torch.Tensor:
    """transformers' modules on packed tokens, with torch's varlen attention: what one could write by hand."""
    x = theirs.embeddings(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])[0]
    for layer in theirs.encoder.layer:
        own = layer.attention.self
        q, k, v = (p(x).view(x.shape[0], own.num_attention_heads, -1) for p in (own.query, own.key, own.value))
        context = varlen(torch.stack([q, k, v], 1), batch.cu_seqlens, batch.max_seqlen).flatten(1)
        x = layer.attention.output(context, x)
        x = layer.output(layer.intermediate(x), x)
    return x
