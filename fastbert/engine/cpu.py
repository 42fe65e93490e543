"""The CPU engine: a model's weights packed once into native panels, and one native call for a whole forward pass.

It knows nothing of padding, of autograd or of when it is asked.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert import machine, native
from fastbert.engine.release import let_go, own_memory, trim
from fastbert.engine.watch import Watch, layers_of, parts_of, refusal
from fastbert.models.activations import ACTIVATIONS, Activation
from fastbert.models.albert import AlbertEncoder
from fastbert.models.electra import ElectraModel
from fastbert.models.encoder import EncoderModel, FeedForward
from fastbert.models.mpnet import MPNetEncoder, relative_buckets
from fastbert.models.pretrained import PreTrainedModel
from fastbert.models.quantize import Int8Linear
from fastbert.packing import PackedBatch

_ACTIVATIONS: dict[Activation, str] = {
    ACTIVATIONS["gelu"]: "gelu",
    ACTIVATIONS["gelu_new"]: "gelu_tanh",
    ACTIVATIONS["relu"]: "relu",
    ACTIVATIONS["silu"]: "silu",
    ACTIVATIONS["linear"]: "identity",
}

_DTYPES = (torch.float32, torch.bfloat16)


def _refusal(parts: tuple[nn.Module, ...]) -> str | None:
    """Why the engine cannot compute these modules."""
    reason = refusal(parts, "cpu", _DTYPES, (nn.Linear, Int8Linear))
    if reason is not None:
        return reason
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, FeedForward) and module.act not in _ACTIVATIONS:
                has = ", ".join(_ACTIVATIONS.values())
                return f"{name} (FeedForward) has an activation that the engine lacks (it has {has})"
    return None


def _linear(linear: nn.Module) -> tuple[Any, ...]:
    """(weight, bias), and of 8-bit weights (..., scale, scale of inputs, leading outputs whose inputs have 8 bits)."""
    if isinstance(linear, Int8Linear):
        assert linear.bias is not None
        narrow = _num_narrow(linear)
        return linear.weight.contiguous(), linear.bias, linear.weight_scale, linear.input_scale, narrow
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach().contiguous(), linear.bias.detach().contiguous()


def _num_narrow(linear: Int8Linear) -> int:
    """16 bits are no slower than 8 on a CPU that has no instruction for 8."""
    return linear.num_narrow if native.require().has_fours() else 0


def _norm(norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor, float]:
    return norm.weight.detach().contiguous(), norm.bias.detach().contiguous(), norm.eps


def _table(embedding: nn.Embedding | None) -> torch.Tensor | None:
    return None if embedding is None else embedding.weight.detach().contiguous()


def _weights(model: EncoderModel) -> dict[str, Any] | str:
    """What `_C.Encoder` packs, or why the layers do not form one encoder."""
    embeddings, encoder = model.embeddings, model.encoder
    order = list(layers_of(encoder))
    unique = list(dict.fromkeys(order))
    for what in (
        {layer.attention.num_heads for layer in order},
        {layer.feed_forward.act for layer in order},
        {layer.feed_forward.intermediate.weight.shape for layer in order},
    ):
        if len(what) != 1:
            return f"the layers differ or there are none: {what}"
    project = None
    if isinstance(encoder, AlbertEncoder):
        project = encoder.embedding_hidden_mapping_in
    elif isinstance(model, ElectraModel) and not isinstance(model.embeddings_project, nn.Identity):
        project = model.embeddings_project
    rel_bias = None
    if isinstance(encoder, MPNetEncoder):
        table = encoder.relative_attention_bias.weight.detach()
        rel_bias = F.embedding(relative_buckets(table.device), table).mT.float().contiguous()
    return {
        "word": _table(embeddings.word_embeddings),
        "position": _table(embeddings.position_embeddings),
        "token_type": _table(embeddings.token_type_embeddings),
        "embed_norm": _norm(embeddings.LayerNorm),
        "project": None if project is None else _linear(project),
        "num_heads": order[0].attention.num_heads,
        "activation": _ACTIVATIONS[order[0].feed_forward.act],
        "layers": [
            {
                "qkv": _linear(layer.attention.qkv),
                "dense": _linear(layer.attention.dense),
                "attention_norm": _norm(layer.attention_LayerNorm),
                "intermediate": _linear(layer.feed_forward.intermediate),
                "output": _linear(layer.feed_forward.output),
                "output_norm": _norm(layer.output_LayerNorm),
            }
            for layer in unique
        ],
        "order": [unique.index(layer) for layer in order],
        "rel_bias": rel_bias,
    }


def _asks_for_high() -> bool:
    """Whether torch's precision of fp32 products on a CPU is less than "highest": what
    `torch.set_float32_matmul_precision("high")` sets."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("tf32", "bf16")  # type: ignore[attr-defined]


def _may_split() -> bool:
    """Whether fp32 products may be made of bf16 ones, and this CPU is faster so."""
    return _asks_for_high() and native.require().has_split()


def _precision(weights: dict[str, Any], high: bool) -> str:
    """Weights, and where they are integers activations, in words."""
    weight, _, *integers = weights["layers"][0]["dense"]
    if integers:
        return f"int8 with {8 if integers[-1] else 16}-bit activations"
    if high:
        return "float32 as three products of bfloat16"
    return str(weight.dtype).removeprefix("torch.")


_team_ran = False  # in this process


def _one_thread_in_child() -> None:
    """After a fork the runtime of OpenMP waits for threads that only the parent has, in torch's ops as in ours."""
    if _team_ran:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread_in_child)


class Engine:
    """A model frozen into native panels. It can be called from several threads at once.

    Attributes:
        dtype: of hidden states, results and, unless they have 8 bits, weights; sums are fp32 or exact integers.
        nbytes: memory of the packed weights; tables of embeddings are the model's own.
        released: whether the panels are all that is left of the weights.
        pinned: whether it counts as fresh without a look; see `fastbert.engine.choice.pin`.
    """

    def __init__(self, watch: Watch, weights: dict[str, Any]) -> None:
        self._watch = watch
        self.released = self.pinned = False
        self._tables = [weights[name] for name in ("word", "position", "token_type")]  # the encoder only borrows them
        self._is_float32 = weights["layers"][0]["dense"][0].dtype == torch.float32
        self._high = self._is_float32 and _may_split()
        self._encoder = native.require().Encoder(weights, self._high)
        self._isa = native.isa()
        self._cores = machine.cpu().usable
        self._num_layers = len(weights["order"])
        self._width = weights["layers"][0]["dense"][0].shape[0]
        self._has_types = weights["token_type"] is not None
        self.dtype: torch.dtype = weights["word"].dtype
        self.nbytes: int = self._encoder.nbytes
        self._precision = _precision(weights, self._high)

    def is_fresh(self, model: EncoderModel) -> bool:
        """Whether the model is still what was packed: same modules, settings, precision, no parameter written to.

        A write to a few elements through `.data` or NumPy, which torch does not count, may go unseen.
        """
        if self.pinned:
            return True
        if self._is_float32 and self._high != _may_split():
            return False
        return parts_of(model) == self._watch.parts and self._watch.same()

    @property
    def num_threads(self) -> int:
        """Threads of a call made now: torch's setting, no more than affinity and container quota allowed as the model
        was packed. Threads without a core would be waited for at every stage."""
        return min(torch.get_num_threads(), self._cores)

    def run(self, batch: PackedBatch, pooling: str | None = None, unit: bool = False) -> torch.Tensor:
        """PackedBatch on the CPU -> hidden states (T, D) of the last layer; with a mode of `ops.pool`, vectors (S, D),
        which `unit` makes fp32 and of length 1.

        Raises:
            IndexError: ids outside a table.
            ValueError: `cu_seqlens` or `max_seqlen` that do not fit the tokens; `unit` without a mode.
        """
        rows = batch.num_tokens if pooling is None else batch.num_sequences
        out = torch.empty(rows, self._width, dtype=torch.float32 if unit else self.dtype)
        types = None if batch.type_ids is None or not self._has_types else batch.type_ids.contiguous()
        global _team_ran
        _team_ran = _team_ran or self.num_threads > 1
        self._encoder.forward(
            batch.input_ids.contiguous(), batch.position_ids.contiguous(), types, batch.cu_seqlens.contiguous(),
            out, batch.max_seqlen, self.num_threads, pooling, unit,
        )  # fmt: skip
        return out

    def __str__(self) -> str:
        exact = self._is_float32 and not self._high and _asks_for_high()
        return (
            f"cpu engine: {self._precision}{' (exact: only AMX is faster below)' if exact else ''}, {self._isa}, "
            f"{self.num_threads} threads, {self._num_layers} layers in {self.nbytes / 1e6:.1f} MB of panels"
        )


def compile_and_release(model: PreTrainedModel, base: EncoderModel) -> Engine | str:
    """Pack `base`, the encoder of `model`, and let the packed weights go; or say why the engine cannot compute it."""
    reason = _refusal(parts_of(base))
    if reason is not None:
        return reason
    own_memory(model, parts_of(base))  # before the engine borrows the tables
    engine = compile(base)
    if isinstance(engine, Engine):
        let_go(parts_of(base))
        engine._watch, engine.released = Watch(parts_of(base)), True
        trim()
    return engine


def compile(model: EncoderModel) -> Engine | str:
    """Pack the model as it is now, or say why the engine cannot compute it."""
    parts = parts_of(model)
    reason = _refusal(parts)
    if reason is not None:
        return reason
    watch = Watch(parts)  # before the weights are read: a change in between makes the engine stale, not wrong
    weights = _weights(model)
    return weights if isinstance(weights, str) else Engine(watch, weights)
