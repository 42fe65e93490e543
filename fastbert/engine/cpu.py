"""The CPU engine: a model's weights packed once into native panels, and one native call for a whole forward pass.

It reads the modules that all families share by their names, and watches them: whatever changes a weight, a setting or
the shape of the model makes `is_fresh` false. It knows nothing of padding, of autograd or of when it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastbert import native
from fastbert.models.activations import ACTIVATIONS, Activation
from fastbert.models.albert import AlbertEncoder, AlbertLayer
from fastbert.models.electra import ElectraModel
from fastbert.models.encoder import AddLayerNorm, Embeddings, Encoder, EncoderModel, FeedForward, Layer, SelfAttention
from fastbert.models.mpnet import MPNetEncoder, relative_buckets
from fastbert.models.quantize import Int8Linear
from fastbert.packing import PackedBatch

# The modules whose forward the native call reproduces, exactly these classes; and the attributes that it reads of them.
_SETTINGS: dict[type, tuple[str, ...]] = {
    AddLayerNorm: ("eps",),
    AlbertEncoder: ("group_of_layer",),
    AlbertLayer: (),
    Embeddings: (),
    Encoder: (),
    FeedForward: ("act",),
    Int8Linear: ("activation_bits",),
    Layer: (),
    MPNetEncoder: (),
    SelfAttention: ("num_heads",),
    nn.Embedding: (),
    nn.Identity: (),
    nn.LayerNorm: ("eps",),
    nn.Linear: (),
    nn.ModuleDict: (),
    nn.ModuleList: (),
}

_ACTIVATIONS: dict[Activation, str] = {
    ACTIVATIONS["gelu"]: "gelu",
    ACTIVATIONS["gelu_new"]: "gelu_tanh",
    ACTIVATIONS["relu"]: "relu",
    ACTIVATIONS["silu"]: "silu",
    ACTIVATIONS["linear"]: "identity",
}

_DTYPES = (torch.float32, torch.bfloat16)


def _parts(model: EncoderModel) -> tuple[nn.Module, ...]:
    """The modules that the engine replaces, with all below them."""
    project = (model.embeddings_project,) if isinstance(model, ElectraModel) else ()
    return model.embeddings, *project, model.encoder


def _homes(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the module holds the tensors that the engine reads: (dictionary, key)."""
    held = module._buffers if isinstance(module, Int8Linear) else module._parameters
    return ((held, name) for name in held)


def _altered(state: dict[str, Any]) -> str | None:
    """What makes calling the module with these attributes mean something else than its class says."""
    if state["training"]:
        return "is in training mode"
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return "has a forward hook"
    return "has a forward of its own on the instance" if "forward" in state else None


_version = attrgetter("_version")


class _Watch:
    """The modules and tensors as they were: cheap to compare with what they are."""

    def __init__(self, parts: tuple[nn.Module, ...]) -> None:
        self.parts = parts
        modules = [module for part in parts for module in part.modules()]
        self.modules = [(m.__dict__, dict(m._modules)) for m in modules]
        self.settings = [(m.__dict__, name) for m in modules for name in _SETTINGS[type(m)]]
        self.values = [copy(state[name]) for state, name in self.settings]
        self.homes = [home for m in modules for home in _homes(m)]
        self.tensors = [held[name] for held, name in self.homes]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.versions = list(map(_version, self.tensors))
        # Aliases keep the memory of a replaced tensor from being given to the one that replaces it.
        self.aliases = [tensor.detach() for tensor in self.tensors]
        # Writes through `.data` or NumPy are not counted by torch: samples of the values see all but the smallest.
        flat = [alias if alias.is_contiguous() else alias.mT for alias in self.aliases]
        self.samples = native.require().Samples([tensor for tensor in flat if tensor.is_contiguous()])

    def same(self) -> bool:
        for state, children in self.modules:
            # `_altered` inline: this loop is most of what a call of one short text pays besides its products.
            if state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return False
            if state["_modules"] != children:
                return False
        if [state[name] for state, name in self.settings] != self.values:
            return False
        now = [held.get(name) for held, name in self.homes]
        return (
            all(map(is_, now, self.tensors))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(_version, self.tensors)) == self.versions
            and self.samples.same()
        )


def _refusal(parts: tuple[nn.Module, ...]) -> str | None:
    """Why the engine cannot compute these modules."""
    dtypes: set[torch.dtype] = set()
    linears: set[type] = set()
    for part in parts:
        for name, module in part.named_modules():
            what = f"{name or 'the ' + type(module).__name__.lower()} ({type(module).__name__})"
            if type(module) not in _SETTINGS:
                return f"{what} is not a module that the engine knows"
            altered = _altered(module.__dict__)
            if altered:
                return f"{what} {altered}"
            if isinstance(module, FeedForward) and module.act not in _ACTIVATIONS:
                return f"{what} has an activation that the engine lacks (it has {', '.join(_ACTIVATIONS.values())})"
            linears |= {type(module)} & {nn.Linear, Int8Linear}
            for held, key in _homes(module):
                tensor = held[key]
                if tensor is None:
                    return f"{what} lacks a parameter that its class has"
                if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.layout != torch.strided:
                    return f"{what} holds a {type(tensor).__name__}, not a plain tensor"
                if tensor.device.type != "cpu":
                    return f"{what} is on {tensor.device}"
                if tensor.is_inference():
                    return f"{what} was made in inference_mode: torch does not count its changes"
                if tensor.dtype != torch.int8:
                    dtypes.add(tensor.dtype)
    if len(linears) != 1:
        return "some of its linear layers have 8-bit weights and some have not"
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"the parameters are {' and '.join(sorted(map(str, dtypes)))}, the engine needs one of {_DTYPES}"
    return None


def _linear(linear: nn.Module) -> tuple[Any, ...]:
    """(weight, bias), and of 8-bit weights (..., scale, whether activations have 8 bits too)."""
    if isinstance(linear, Int8Linear):
        assert linear.bias is not None
        return linear.weight.contiguous(), linear.bias, linear.weight_scale, _activation_bits(linear) == 8
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach().contiguous(), linear.bias.detach().contiguous()


def _activation_bits(linear: Int8Linear) -> int:
    """16 bits are no slower than 8 on a CPU that has no instruction for 8."""
    return linear.activation_bits if native.require().has_fours() else 16


def _norm(norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor, float]:
    return norm.weight.detach().contiguous(), norm.bias.detach().contiguous(), norm.eps


def _table(embedding: nn.Embedding | None) -> torch.Tensor | None:
    return None if embedding is None else embedding.weight.detach().contiguous()


def _layers(encoder: nn.Module) -> Iterator[Layer]:
    """Every layer in the order of computation; shared ones come again."""
    assert isinstance(encoder, (Encoder, AlbertEncoder))
    for layer in encoder.layer if isinstance(encoder, Encoder) else encoder.layers():
        assert isinstance(layer, Layer)
        yield layer


def _weights(model: EncoderModel) -> dict[str, Any] | str:
    """What `_C.Encoder` packs, or why the layers do not form one encoder."""
    embeddings, encoder = model.embeddings, model.encoder
    order = list(_layers(encoder))
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


def _precision(weights: dict[str, Any]) -> str:
    """Weights, and where they are integers activations, in words."""
    weight, _, *integers = weights["layers"][0]["dense"]
    if integers:
        return f"int8 with {8 if integers[1] else 16}-bit activations"
    return str(weight.dtype).removeprefix("torch.")


class Engine:
    """A model frozen into native panels. It can be called from several threads at once.

    Attributes:
        dtype: of hidden states, results and, unless they have 8 bits, weights; sums are fp32 or exact integers.
        nbytes: memory of the packed weights; tables of embeddings are the model's own.
    """

    def __init__(self, watch: _Watch, weights: dict[str, Any]) -> None:
        self._watch = watch
        self._tables = [weights[name] for name in ("word", "position", "token_type")]  # the encoder only borrows them
        self._encoder = native.require().Encoder(weights)
        self._isa = native.isa()
        self._num_layers = len(weights["order"])
        self._width = weights["layers"][0]["dense"][0].shape[0]
        self._has_types = weights["token_type"] is not None
        self.dtype: torch.dtype = weights["word"].dtype
        self.nbytes: int = self._encoder.nbytes
        self._precision = _precision(weights)

    def is_fresh(self, model: EncoderModel) -> bool:
        """Whether the model is still what was packed: same modules, same settings, no parameter written to.

        A write to a few elements through `.data` or NumPy, which torch does not count, may go unseen.
        """
        return _parts(model) == self._watch.parts and self._watch.same()

    def run(self, batch: PackedBatch) -> torch.Tensor:
        """PackedBatch on the CPU -> hidden states (T, D) of the last layer.

        Raises:
            IndexError: ids outside a table.
            ValueError: `cu_seqlens` or `max_seqlen` that do not fit the tokens.
        """
        hidden_TD = torch.empty(batch.num_tokens, self._width, dtype=self.dtype)
        types = None if batch.type_ids is None or not self._has_types else batch.type_ids.contiguous()
        self._encoder.forward(
            batch.input_ids.contiguous(), batch.position_ids.contiguous(), types, batch.cu_seqlens.contiguous(),
            hidden_TD, batch.max_seqlen, torch.get_num_threads(),
        )  # fmt: skip
        return hidden_TD

    def __str__(self) -> str:
        return (
            f"cpu engine: {self._precision}, {self._isa}, {torch.get_num_threads()} threads, "
            f"{self._num_layers} layers in {self.nbytes / 1e6:.1f} MB of panels"
        )


def compile(model: EncoderModel) -> Engine | str:
    """Pack the model as it is now, or say why the engine cannot compute it."""
    parts = _parts(model)
    reason = _refusal(parts)
    if reason is not None:
        return reason
    watch = _Watch(parts)  # before the weights are read: a change in between makes the engine stale, not wrong
    weights = _weights(model)
    return weights if isinstance(weights, str) else Engine(watch, weights)
