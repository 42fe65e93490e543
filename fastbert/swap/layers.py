"""The families' layers on packed tokens: Hugging Face's modules and parameters, in fastbert's ops.

Each class is a subclass of Hugging Face's layer with its name and without state: a live layer gets it as its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.models.albert import modeling_albert
from transformers.models.bert import modeling_bert
from transformers.models.camembert import modeling_camembert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.mpnet import modeling_mpnet
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from fastbert.models.plain import is_plain, split_linear
from fastbert.ops import add_layer_norm, attention, gelu
from fastbert.ops.dropout import draw_seed
from fastbert.packing import Padding

_GELUS = {activations.GELUActivation: "none", activations.NewGELUActivation: "tanh", activations.GELUTanh: "tanh"}


@dataclass(frozen=True)
class Rows:
    """What packed layers get in the place of a mask: sequence bounds, the way back to (B, L), a bias of offsets."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    padding: Padding
    rel_bias: torch.Tensor | None = None


def _linears(x: torch.Tensor, *modules: Any) -> torch.Tensor:
    """Outputs of several linears side by side; one GEMM where none is wrapped and weights are the smaller copy."""
    if x.shape[0] > x.shape[1] and all(is_plain(m, nn.Linear) for m in modules):
        weight, bias = torch.cat([m.weight for m in modules]), torch.cat([m.bias for m in modules])
        return F.linear(x, weight, bias)
    return torch.cat([m(x) for m in modules], dim=-1)


def _attend(x: torch.Tensor, qkv: torch.Tensor, heads: int, dropout: nn.Dropout, rows: Rows) -> torch.Tensor:
    p = dropout.p if dropout.training else 0.0
    qkv = qkv.view(x.shape[0], 3, heads, qkv.shape[1] // (3 * heads))
    out = attention(qkv, rows.cu_seqlens, rows.max_seqlen, dropout_p=p, seed=draw_seed(p), rel_bias=rows.rel_bias)
    return out.flatten(1)


def _add_norm(
    norm: Any, linear: Any, x: torch.Tensor, residual: torch.Tensor, dropout: nn.Dropout | None
) -> torch.Tensor:
    """LN(residual + dropout(linear(x)))."""
    p = dropout.p if dropout is not None and dropout.training else 0.0
    if is_plain(norm, nn.LayerNorm):
        x, bias = split_linear(linear, x)
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, p, draw_seed(p), bias)
    return norm(F.dropout(linear(x), p) + residual)


def _activate(act: Any, x: torch.Tensor) -> torch.Tensor:
    form = _GELUS.get(type(act))
    return act(x) if form is None or "forward" in vars(act) else gelu(x, approximate=form)


class PackedLayer(nn.Module):
    """A layer that computes on tokens when it is given `Rows`, and is Hugging Face's own when it is given a mask."""

    parts: ClassVar[tuple[str, ...]]  # submodules whose forward is not called: they must be Hugging Face's own

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """(T, D) -> (T, D); (B, L, D) -> (B, L, D) where hooks look at the layer."""
        rows = attention_mask
        if not isinstance(rows, Rows):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if hidden_states.ndim == 2:
            return self.packed(hidden_states, rows)
        return rows.padding.unpack(self.packed(rows.padding.pack(hidden_states), rows))

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        raise NotImplementedError


class BertLike(PackedLayer):
    """The layer that BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA share."""

    attention: Any
    parts = ("attention", "attention.self", "attention.output", "intermediate", "output")

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner, output = self.attention.self, self.attention.output
        qkv = _linears(x, inner.query, inner.key, inner.value)
        context = _attend(x, qkv, inner.num_attention_heads, inner.dropout, rows)
        x = _add_norm(output.LayerNorm, output.dense, context, x, output.dropout)
        return _feed_forward(self, x)


def _feed_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y = _activate(layer.intermediate.intermediate_act_fn, layer.intermediate.dense(x))
    return _add_norm(layer.output.LayerNorm, layer.output.dense, y, x, layer.output.dropout)


class BertLayer(BertLike, modeling_bert.BertLayer):
    """BERT's layer on tokens."""


class RobertaLayer(BertLike, modeling_roberta.RobertaLayer):
    """RoBERTa's layer on tokens."""


class XLMRobertaLayer(BertLike, modeling_xlm_roberta.XLMRobertaLayer):
    """XLM-RoBERTa's layer on tokens."""


class CamembertLayer(BertLike, modeling_camembert.CamembertLayer):
    """CamemBERT's layer on tokens."""


class ElectraLayer(BertLike, modeling_electra.ElectraLayer):
    """ELECTRA's layer on tokens."""


class AlbertLayer(PackedLayer, modeling_albert.AlbertLayer):
    """ALBERT's layer on tokens: no dropout after the feed-forward network."""

    parts = ("attention",)

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner = self.attention
        qkv = _linears(x, inner.query, inner.key, inner.value)
        context = _attend(x, qkv, inner.num_attention_heads, inner.attention_dropout, rows)
        x = _add_norm(inner.LayerNorm, inner.dense, context, x, inner.output_dropout)
        return _add_norm(self.full_layer_layer_norm, self.ffn_output, _activate(self.activation, self.ffn(x)), x, None)


class TransformerBlock(PackedLayer, modeling_distilbert.TransformerBlock):
    """DistilBERT's layer on tokens: no dropout after the attention's output."""

    parts = ("attention", "ffn")

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner, ffn = self.attention, self.ffn
        qkv = _linears(x, inner.q_lin, inner.k_lin, inner.v_lin)
        x = _add_norm(self.sa_layer_norm, inner.out_lin, _attend(x, qkv, inner.n_heads, inner.dropout, rows), x, None)
        return _add_norm(self.output_layer_norm, ffn.lin2, _activate(ffn.activation, ffn.lin1(x)), x, ffn.dropout)


class MPNetLayer(PackedLayer, modeling_mpnet.MPNetLayer):
    """MPNet's layer on tokens: its bias of relative positions comes with the rows."""

    parts = ("attention", "attention.attn", "intermediate", "output")

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `PackedLayer`, in a tuple of one, as MPNet's loop expects it."""
        out = super().forward(hidden_states, attention_mask, *args, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    def packed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        inner = self.attention.attn
        context = _attend(x, _linears(x, inner.q, inner.k, inner.v), inner.num_attention_heads, inner.dropout, rows)
        x = _add_norm(self.attention.LayerNorm, inner.o, context, x, self.attention.dropout)
        return _feed_forward(self, x)
