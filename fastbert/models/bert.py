"""BERT (Devlin et al. 2018, arXiv 1810.04805), computed on packed batches.

Inside, hidden states are (T, D): tokens of all sequences end to end. `BertModel.forward` is the border where the
padded (B, L) world of Hugging Face begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastbert.models.activations import activation
from fastbert.models.config import Config
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import add_layer_norm, attention, embed, pool
from fastbert.ops.attention import attention_probs
from fastbert.ops.dropout import draw_seed
from fastbert.packing import PackedBatch, pack_padded
from fastbert.weights import NameTable, speak_hf_names


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """BERT-base unless told otherwise; large is 1024 / 24 / 16 / 4096."""

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None

    def validate(self) -> None:
        super().validate()
        activation(self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


NAMES = NameTable(
    {
        "encoder.layer.{}.attention.qkv": (
            "encoder.layer.{}.attention.self.query",
            "encoder.layer.{}.attention.self.key",
            "encoder.layer.{}.attention.self.value",
        ),
        "encoder.layer.{}.attention.dense": "encoder.layer.{}.attention.output.dense",
        "encoder.layer.{}.attention_LayerNorm": "encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layer.{}.feed_forward.intermediate": "encoder.layer.{}.intermediate.dense",
        "encoder.layer.{}.feed_forward.output": "encoder.layer.{}.output.dense",
        "encoder.layer.{}.output_LayerNorm": "encoder.layer.{}.output.LayerNorm",
    }
)


@dataclass
class Trace:
    """What a forward pass records on request: hidden states (T, D) and probabilities, each a list over layers."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[list[torch.Tensor]] | None = None

    def hidden(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Record and pass on."""
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_TD)
        return hidden_TD


class AddLayerNorm(nn.LayerNorm):
    """LN(residual + dropout(x)): an `nn.LayerNorm`, so that optimisers know it and do not decay it."""

    def __init__(self, hidden_size: int, eps: float, dropout_p: float = 0.0) -> None:
        super().__init__(hidden_size, eps=eps)
        self.dropout_p = dropout_p

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(T, D), (T, D) -> (T, D)."""
        p = self.dropout_p if self.training else 0.0
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, p, draw_seed(p))


class Embeddings(nn.Module):
    """Word + segment + position, normalised (fig. 2 of the paper)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, batch: PackedBatch, word: torch.Tensor | None = None) -> torch.Tensor:
        """PackedBatch -> (T, D). `word` replaces the table of word embeddings."""
        padding_idx = self.word_embeddings.padding_idx if word is None else None
        word = self.word_embeddings.weight if word is None else word
        types = torch.zeros_like(batch.input_ids) if batch.type_ids is None else batch.type_ids
        p = self.dropout_p if self.training else 0.0
        return embed(
            batch.input_ids, batch.position_ids, types,
            word, self.position_embeddings.weight, self.token_type_embeddings.weight,
            self.LayerNorm.weight, self.LayerNorm.bias, self.LayerNorm.eps, padding_idx, p, draw_seed(p),
        )  # fmt: skip


class SelfAttention(nn.Module):
    """Multi-head self-attention and its output projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.dense = nn.Linear(D, D)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        qkv = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1)
        if trace.attentions is not None:
            trace.attentions.append(attention_probs(qkv, batch.cu_seqlens))
        p = self.dropout_p if self.training else 0.0
        context = attention(qkv, batch.cu_seqlens, batch.max_seqlen, dropout_p=p, seed=draw_seed(p))
        return self.dense(context.flatten(1))


class FeedForward(nn.Module):
    """Two linears with an activation between."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        return self.output(self.act(self.intermediate(x)))


class Layer(nn.Module):
    """A transformer layer: norm(sublayer(x), x), twice."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        D, eps, p = config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob
        self.attention = SelfAttention(config)
        self.attention_LayerNorm = AddLayerNorm(D, eps, p)
        self.feed_forward = FeedForward(config)
        self.output_LayerNorm = AddLayerNorm(D, eps, p)

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        x = self.attention_LayerNorm(self.attention(x, batch, trace), x)
        return self.output_LayerNorm(self.feed_forward(x), x)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        for layer in self.layer:
            x = layer(trace.hidden(x), batch, trace)
        return trace.hidden(x)


class Pooler(nn.Module):
    """tanh(W h + b) of each sequence's first token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(T, D) -> (S, D)."""
        return torch.tanh(self.dense(pool(hidden_TD, batch.cu_seqlens, "cls")))


class BertModel(PreTrainedModel):
    """The encoder, with Hugging Face's calling convention, names and outputs.

    Padding is removed once at the door and put back once at the end: padded positions of the outputs are 0.
    The pooler reads each row's first kept token, which under left padding is [CLS] and not column 0.
    """

    config_class = BertConfig
    base_model_prefix = "bert"
    head_roots = ("pooler", "cls", "classifier", "qa_outputs")

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()
        speak_hf_names(self, NAMES)

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word embeddings."""
        return self.embeddings.word_embeddings

    def forward_packed(
        self, batch: PackedBatch, trace: Trace | None = None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """PackedBatch -> hidden states (T, D) of the last layer; nothing is padded.

        `inputs_embeds` (N, D) replaces the word table: `batch.input_ids` are then rows of it.
        """
        return self.encoder(self.embeddings(batch, inputs_embeds), batch, trace or Trace())

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """The padded call of `transformers`.

        Args:
            input_ids: (B, L) int64; or `inputs_embeds` (B, L, D), exactly one of them.
            attention_mask: (B, L), non-zero = keep, any pattern. A row without a kept token gives zeros.
            token_type_ids: (B, L); None = all 0.
            position_ids: (B, L) or (1, L); None = the column.
            output_attentions, output_hidden_states: also return each layer's; None = as the configuration says.
            return_dict: False gives a tuple.

        Returns:
            `last_hidden_state` (B, L, D), `pooler_output` (B, D), `hidden_states` (num_layers + 1 times (B, L, D)),
            `attentions` (num_layers times (B, H, L, L), exact probabilities before dropout).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or shapes and masks that do not fit.
            IndexError: ids outside a table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        table = None
        if inputs_embeds is not None:
            B, L, D = inputs_embeds.shape
            table, input_ids = (
                inputs_embeds.reshape(B * L, D),
                torch.arange(B * L, device=inputs_embeds.device).view(B, L),
            )
        assert input_ids is not None
        batch, padding = pack_padded(input_ids, attention_mask, token_type_ids, position_ids)
        trace = Trace(
            [] if _or(output_hidden_states, self.config.output_hidden_states) else None,
            [] if _or(output_attentions, self.config.output_attentions) else None,
        )
        hidden_TD = self.forward_packed(batch, trace, table)
        output = BaseModelOutputWithPooling(
            last_hidden_state=padding.unpack(hidden_TD),
            pooler_output=None if self.pooler is None else self.pooler(hidden_TD, batch),
            hidden_states=None if trace.hidden_states is None else tuple(map(padding.unpack, trace.hidden_states)),
            attentions=None if trace.attentions is None else tuple(map(padding.unpack_square, trace.attentions)),
        )
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
