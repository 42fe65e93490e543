"""The layers of the post-norm encoder that the families share, and the border to the padded world.

Inside, hidden states are (T, D): tokens of all sequences end to end. `EncoderModel.encode` is the door where padding
is removed, `Encoded.unpack` the one where it is put back. It knows no family: configurations arrive duck-typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastbert.models.activations import WITH_BIAS, activation
from fastbert.models.layer_stack import LayerStack, Trace
from fastbert.models.outputs import BaseModelOutput, BaseModelOutputWithPooling
from fastbert.models.plain import split_linear
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import add_layer_norm, attention, embed, l2_normalize, pool
from fastbert.ops.attention import attention_probs
from fastbert.ops.dropout import draw_seed, dropout_ref
from fastbert.packing import PackedBatch, Padding, pack_padded

Layers = bool | int | Sequence[int]
Split = tuple[torch.Tensor, torch.Tensor | None]


@cache
def _engines() -> ModuleType:
    """The floor above, found by name on first use."""
    return import_module("fastbert.engine")


class Dropout(nn.Dropout):
    """Dropout of (N, D) rows by the hash that all ops share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        p = self.p if self.training else 0.0
        return dropout_ref(x, p, draw_seed(p))


class AddLayerNorm(nn.LayerNorm):
    """LN(residual + dropout(x)): an `nn.LayerNorm`, so that optimisers know it and do not decay it."""

    def __init__(self, hidden_size: int, eps: float, dropout_p: float = 0.0) -> None:
        super().__init__(hidden_size, eps=eps)
        self.dropout_p = dropout_p

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, x_bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(T, D), (T, D), (D) -> (T, D)."""
        p = self.dropout_p if self.training else 0.0
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, p, draw_seed(p), x_bias)


class Embeddings(nn.Module):
    """Word + segment + position, normalised; `type_vocab_size` 0 means a family without segments."""

    def __init__(
        self, config: Any, size: int, type_vocab_size: int, padding_idx: int | None, position_padding_idx: int | None
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=padding_idx)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size, padding_idx=position_padding_idx)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, size) if type_vocab_size else None
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, batch: PackedBatch, word: torch.Tensor | None = None) -> torch.Tensor:
        """PackedBatch -> (T, E). `word` (N, E) replaces the table of word embeddings."""
        padding_idx = self.word_embeddings.padding_idx if word is None else None
        word = self.word_embeddings.weight if word is None else word
        types, type_table = None, None
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(batch.input_ids) if batch.type_ids is None else batch.type_ids
            type_table = self.token_type_embeddings.weight
        position, row = self.position_embeddings.weight, self.position_embeddings.padding_idx
        if row is not None and torch.is_grad_enabled():  # a kept padding token does not train its position either
            position = torch.cat([position[:row], position[row : row + 1].detach(), position[row + 1 :]])
        p = self.dropout_p if self.training else 0.0
        return embed(
            batch.input_ids, batch.position_ids, types, word, position, type_table,
            self.LayerNorm.weight, self.LayerNorm.bias, self.LayerNorm.eps, padding_idx, p, draw_seed(p),
        )  # fmt: skip


class SelfAttention(nn.Module):
    """Multi-head self-attention and its output projection, whose bias is left to the norm after it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.dense = nn.Linear(D, D)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace, rel_bias: torch.Tensor | None = None) -> Split:
        """(T, D) -> (T, D) and the bias (D) to add. `rel_bias` as in `fastbert.ops.attention`."""
        qkv = self.qkv(x).view(x.shape[0], 3, self.num_heads, x.shape[1] // self.num_heads)
        if trace.attentions is not None:
            trace.attentions.append(attention_probs(qkv, batch.cu_seqlens, rel_bias=rel_bias))
        p = self.dropout_p if self.training else 0.0
        context = attention(qkv, batch.cu_seqlens, batch.max_seqlen, dropout_p=p, seed=draw_seed(p), rel_bias=rel_bias)
        return split_linear(self.dense, context.flatten(1))


class FeedForward(nn.Module):
    """Two linears with an activation between; the second one's bias is left to the norm after it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> Split:
        """(T, D) -> (T, D) and the bias (D) to add."""
        if self.act not in WITH_BIAS:
            return split_linear(self.output, self.act(self.intermediate(x)))
        return split_linear(self.output, self.act(*split_linear(self.intermediate, x)))


class Layer(nn.Module):
    """A transformer layer: norm(sublayer(x), x), twice."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        D, eps, p = config.hidden_size, config.layer_norm_eps, config.hidden_dropout_prob
        self.attention = SelfAttention(config)
        self.attention_LayerNorm = AddLayerNorm(D, eps, p)
        self.feed_forward = FeedForward(config)
        self.output_LayerNorm = AddLayerNorm(D, eps, p)

    def forward(
        self, x: torch.Tensor, batch: PackedBatch, trace: Trace, rel_bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(T, D) -> (T, D). `rel_bias` as in `fastbert.ops.attention`."""
        y, bias = self.attention(x, batch, trace, rel_bias)
        x = self.attention_LayerNorm(y, x, bias)
        y, bias = self.feed_forward(x)
        return self.output_LayerNorm(y, x, bias)


class Encoder(LayerStack):
    """`num_hidden_layers` layers, each with weights of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: torch.Tensor, batch: PackedBatch, trace: Trace) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        return self.run(self.layer, x, batch, trace)


class Pooler(nn.Module):
    """tanh(W h + b) of each sequence's first token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """(T, D) -> (S, D)."""
        return torch.tanh(self.dense(pool(hidden_TD, batch.cu_seqlens, "cls")))


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of a call: packed hidden states, and the way back to (B, L) where the call was padded."""

    hidden_TD: torch.Tensor
    batch: PackedBatch
    padding: Padding | None = None
    trace: Trace = field(default_factory=Trace)
    layers: Layers | None = None

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (T, ...): keep the real tokens."""
        return self._way_back.pack(values)

    def unpack(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(T, ...) -> (B, L, ...), `fill` at padding."""
        return self._way_back.unpack(values, fill)

    @property
    def _way_back(self) -> Padding:
        if self.padding is None:
            raise ValueError("this batch came packed: it has no padded form")
        return self.padding

    @property
    def first_token(self) -> torch.Tensor:
        """(S, D) hidden state of each sequence's first kept token: [CLS] under any padding."""
        return pool(self.hidden_TD, self.batch.cu_seqlens, "cls")

    @property
    def hidden_states(self) -> tuple[torch.Tensor | None, ...] | None:
        """(num_layers + 1) x (B, L, D) if asked for; entries that a list of layers leaves out are None."""
        states = self.trace.hidden_states
        if states is None:
            return None
        wanted = range(len(states)) if self.layers is True else _as_list(self.layers)
        chosen = {i % len(states) for i in wanted}
        return tuple(self.unpack(h) if i in chosen else None for i, h in enumerate(states))

    @property
    def attentions(self) -> tuple[torch.Tensor, ...] | None:
        """num_layers x (B, H, L, L) if asked for."""
        attentions = self.trace.attentions
        return None if attentions is None else tuple(map(self._way_back.unpack_square, attentions))


def _as_list(layers: Any) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


class EncoderModel(PreTrainedModel):
    """A family's base model: `embeddings`, `encoder`, perhaps a `pooler`, and Hugging Face's padded call.

    Padding is removed once at the door and put back once at the end: padded positions of the outputs are 0.
    The pooler reads each row's first kept token, which under left padding is [CLS] and not column 0.
    """

    embeddings: Embeddings
    encoder: LayerStack
    pooler: nn.Module | None
    position_offset: int = 0  # position id of a sequence's first token

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the table of word embeddings."""
        self.embeddings.word_embeddings = table

    def padded_positions(self, input_ids: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
        """(B, L) or (L) position ids that the family gives a padded batch; None = the column.

        With a `position_offset` tokens count on from it and padding has the position before it. Which tokens are
        padding is read from the ids, whatever the mask says; embeddings count as no padding.
        """
        if self.position_offset == 0:
            return None
        if input_ids is None:
            return self.position_offset + torch.arange(shape[1], device=self.device)
        pad = self.position_offset - 1
        token = input_ids != pad
        return pad + token.cumsum(1) * token

    @property
    def device(self) -> torch.device:
        """Where the parameters are: that of the first one, without a walk over all modules."""
        return self.embeddings.word_embeddings.weight.device

    def forward_packed(
        self, batch: PackedBatch, trace: Trace | None = None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """PackedBatch -> hidden states (T, D) of the last layer; nothing is padded.

        `inputs_embeds` (N, E) replaces the word table: `batch.input_ids` are then rows of it. In `eval()` without
        autograd, where nothing is recorded and no table replaced, an engine computes it if it can: `execution_plan`.
        A batch on the host is staged by the engine, or copied to where the model is.
        """
        recorded = trace is not None and (trace.hidden_states is not None or trace.attentions is not None)
        if self._may_use_engine() and not recorded and inputs_embeds is None:
            hidden_TD = _engines().run(self, batch)
            if hidden_TD is not None:
                return hidden_TD
        batch = batch.to(self.embeddings.word_embeddings.weight.device, non_blocking=True)
        return self.encoder(self.embed(batch, inputs_embeds), batch, trace or Trace())

    def pool_packed(self, batch: PackedBatch, mode: str, unit: bool = False) -> torch.Tensor:
        """PackedBatch -> one vector a sequence, (S, D): `ops.pool` of `forward_packed`, by an engine in one go; and if
        `unit` `ops.l2_normalize` of that, fp32."""
        if self._may_use_engine():
            vectors_SD = _engines().run(self, batch, mode, unit)
            if vectors_SD is not None:
                return vectors_SD
        hidden_TD = self.forward_packed(batch)
        pooled_SD = pool(hidden_TD, batch.cu_seqlens.to(hidden_TD.device, non_blocking=True), mode)
        return l2_normalize(pooled_SD) if unit else pooled_SD

    def _may_use_engine(self) -> bool:
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def encode_packed(self, batch: PackedBatch) -> Encoded:
        """What the heads' `logits` start from, without the padded call: `head.logits(model.encode_packed(batch))`."""
        return Encoded(self.forward_packed(batch), batch)

    def embed(self, batch: PackedBatch, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """PackedBatch -> what the encoder starts from."""
        return self.embeddings(batch, inputs_embeds)

    def execution_plan(self) -> str:
        """What a forward pass called now would run on: an engine, or the chain of ops and the reason why."""
        return _engines().plan(self)

    def encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
    ) -> Encoded:
        """Pack a padded call and run the encoder: the door that base model and heads share.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or shapes and masks that do not fit.
            IndexError: ids outside a table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        table = None
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3:
                raise ValueError(f"inputs_embeds must be (batch, length, size), got {tuple(inputs_embeds.shape)}")
            B, L, _ = inputs_embeds.shape
            if position_ids is None:
                position_ids = self.padded_positions(None, (B, L))
            table = inputs_embeds.flatten(0, 1)
            input_ids = torch.arange(B * L, device=inputs_embeds.device).view(B, L)
        elif position_ids is None and input_ids is not None and input_ids.ndim == 2:
            position_ids = self.padded_positions(input_ids, (input_ids.shape[0], input_ids.shape[1]))
        assert input_ids is not None
        batch, padding = pack_padded(input_ids, attention_mask, token_type_ids, position_ids)
        layers = None if output_hidden_states is False else output_hidden_states
        trace = Trace(None if layers is None else [], [] if output_attentions else None)
        return Encoded(self.forward_packed(batch, trace, table), batch, padding, trace, layers)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Layers | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | BaseModelOutput | tuple[Any, ...]:
        """The padded call of `transformers`.

        Args:
            input_ids: (B, L) int64; or `inputs_embeds` (B, L, E), exactly one of them.
            attention_mask: (B, L), non-zero = keep, any pattern. A row without a kept token gives zeros.
            token_type_ids: (B, L); None = all 0.
            position_ids: (B, L) or (1, L); None = as the family counts.
            output_attentions, output_hidden_states: also return each layer's; None = as the configuration says.
                A layer number or a list of them records only those hidden states.
            return_dict: False gives a tuple.

        Returns:
            `last_hidden_state` (B, L, D), `pooler_output` (B, D), `hidden_states` (num_layers + 1 times (B, L, D)),
            `attentions` (num_layers times (B, H, L, L), exact probabilities before dropout).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or shapes and masks that do not fit.
            IndexError: ids outside a table (checked on the CPU).
        """
        encoded = self.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        return self.finish(self.output(encoded), return_dict)

    def output(self, encoded: Encoded) -> BaseModelOutputWithPooling | BaseModelOutput:
        """What the padded call returns; a family that has no pooler at all returns a `BaseModelOutput`."""
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.unpack(encoded.hidden_TD),
            pooler_output=None if self.pooler is None else self.pooler(encoded.hidden_TD, encoded.batch),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
