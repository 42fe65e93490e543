"""The CPU engine: a model's weights packed once into native panels, and one native call for a whole forward pass.

It reads the modules that all families share by their names, and watches them: whatever changes a weight, a setting or
the shape of the model makes `is_fresh` false. It knows nothing of padding, of autograd or of when it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from fastbert.packing import PackedBatch

# The modules whose forward the native call reproduces, exactly these classes; and the attributes that it reads of them.
_SETTINGS: dict[type, tuple[str, ...]] = {
    AddLayerNorm: ("eps",),
    AlbertEncoder: ("group_of_layer",),
    AlbertLayer: (),
    Embeddings: (),
    Encoder: (),
    FeedForward: ("act",),
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


def _values(module: nn.Module) -> tuple[Any, ...]:
    values = (module.__dict__[name] for name in _SETTINGS[type(module)])
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _altered(state: dict[str, Any]) -> str | None:
    """What makes calling the module with these attributes mean something else than its class says."""
    if state["training"]:
        return "is in training mode"
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return "has a forward hook"
    return "has a forward of its own on the instance" if "forward" in state else None


class _Watch:
    """The modules and tensors as they were: cheap to compare with what they are."""

    def __init__(self, parts: tuple[nn.Module, ...]) -> None:
        self.parts = parts
        modules = [module for part in parts for module in part.modules()]
        self.modules = [(m.__dict__, dict(m._modules)) for m in modules]
        self.settings = [(m, _values(m)) for m in modules if _SETTINGS[type(m)]]
        # The alias keeps the memory of a replaced tensor from being given to the one that replaces it.
        self.tensors = [
            (m._parameters, name, p, p.detach(), p.data_ptr(), p._version)
            for m in modules
            for name, p in m._parameters.items()
            if p is not None
        ]
        # Writes through `.data` or NumPy are not counted by torch: samples of the values see all but the smallest.
        self.samples = native.require().Samples([alias for *_, alias, _, _ in self.tensors if alias.is_contiguous()])

    def same(self) -> bool:
        for state, children in self.modules:
            if state["_modules"] != children or _altered(state):
                return False
        if any(_values(module) != values for module, values in self.settings):
            return False
        for parameters, name, parameter, _, address, version in self.tensors:
            now = parameters.get(name)
            if now is not parameter or now.data_ptr() != address or now._version != version:
                return False
        return self.samples.same()


def _refusal(parts: tuple[nn.Module, ...]) -> str | None:
    """Why the engine cannot compute these modules."""
    dtypes = set()
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
            for parameter in module._parameters.values():
                if parameter is None:
                    return f"{what} lacks a parameter that its class has"
                if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.layout != torch.strided:
                    return f"{what} holds a {type(parameter).__name__}, not a plain tensor"
                if parameter.device.type != "cpu":
                    return f"{what} is on {parameter.device}"
                if parameter.is_inference():
                    return f"{what} was made in inference_mode: torch does not count its changes"
                dtypes.add(parameter.dtype)
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"the parameters are {' and '.join(sorted(map(str, dtypes)))}, the engine needs one of {_DTYPES}"
    return None


def _pair(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return linear.weight.detach().contiguous(), linear.bias.detach().contiguous()


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
    elif isinstance(model, ElectraModel) and isinstance(model.embeddings_project, nn.Linear):
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
        "project": None if project is None else _pair(project),
        "num_heads": order[0].attention.num_heads,
        "activation": _ACTIVATIONS[order[0].feed_forward.act],
        "layers": [
            {
                "qkv": _pair(layer.attention.qkv),
                "dense": _pair(layer.attention.dense),
                "attention_norm": _norm(layer.attention_LayerNorm),
                "intermediate": _pair(layer.feed_forward.intermediate),
                "output": _pair(layer.feed_forward.output),
                "output_norm": _norm(layer.output_LayerNorm),
            }
            for layer in unique
        ],
        "order": [unique.index(layer) for layer in order],
        "rel_bias": rel_bias,
    }


class Engine:
    """A model frozen into native panels. It can be called from several threads at once.

    Attributes:
        dtype: of weights, hidden states and results; sums are fp32.
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
            f"cpu engine: {str(self.dtype).removeprefix('torch.')}, {self._isa}, {torch.get_num_threads()} threads, "
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
