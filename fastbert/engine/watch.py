"""What engines share: which modules they can stand in for, and whether a model is still the one that was compiled.

An engine reads the modules that all families share by their names. Whatever changes a weight that it copied, a setting
or the shape of the model makes `Watch.same` false.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import nn

from fastbert import native
from fastbert.engine.release import Released
from fastbert.models.albert import AlbertEncoder, AlbertLayer
from fastbert.models.electra import ElectraModel
from fastbert.models.encoder import AddLayerNorm, Embeddings, Encoder, EncoderModel, FeedForward, Layer, SelfAttention
from fastbert.models.mpnet import MPNetEncoder
from fastbert.models.quantize import Float8Linear, Int8Linear

# The modules whose forward an engine reproduces, exactly these classes; and the attributes that it reads of them.
SETTINGS: dict[type, tuple[str, ...]] = {
    AddLayerNorm: ("eps",),
    AlbertEncoder: ("group_of_layer",),
    AlbertLayer: (),
    Embeddings: (),
    Encoder: (),
    FeedForward: ("act",),
    Float8Linear: (),
    Int8Linear: ("num_narrow",),
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

QUANTISED = (Int8Linear, Float8Linear)
_LINEARS = (nn.Linear, *QUANTISED)


def parts_of(model: EncoderModel) -> tuple[nn.Module, ...]:
    """The modules that an engine replaces, with all below them."""
    project = (model.embeddings_project,) if isinstance(model, ElectraModel) else ()
    return model.embeddings, *project, model.encoder


def homes(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the module holds the tensors that an engine reads: (dictionary, key)."""
    held = module._buffers if isinstance(module, QUANTISED) else module._parameters
    return ((held, name) for name in held)


def layers_of(encoder: nn.Module) -> Iterator[Layer]:
    """Every layer in the order of computation; shared ones come again."""
    assert isinstance(encoder, (Encoder, AlbertEncoder))
    for layer in encoder.layer if isinstance(encoder, Encoder) else encoder.layers():
        assert isinstance(layer, Layer)
        yield layer


def _altered(state: dict[str, Any]) -> str | None:
    """What makes calling the module with these attributes mean something else than its class says."""
    if state["training"]:
        return "is in training mode"
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return "has a forward hook"
    return "has a forward of its own on the instance" if "forward" in state else None


class Watch:
    """The modules and tensors as they were: cheap to compare with what they are.

    Args:
        parts: what an engine was compiled from.
        copied: whether it holds copies of the weights, so that a write to one makes it stale. An engine that computes
            with the model's own memory sees every write; tensors must only stay where they are.
    """

    def __init__(self, parts: tuple[nn.Module, ...], copied: bool = True) -> None:
        self.parts = parts
        modules = [module for part in parts for module in part.modules()]
        self.modules = [(m.__dict__, dict(m._modules)) for m in modules]
        self.settings = [(m.__dict__, name) for m in modules for name in SETTINGS[type(m)]]
        # A partial function that is copied equals the first no more, and the model would be packed at every call.
        self.values = [v[:] if isinstance(v := state[name], list) else v for state, name in self.settings]
        self.homes = [home for m in modules for home in homes(m)]
        self.tensors = [held[name] for held, name in self.homes]
        filled = [tensor for tensor in self.tensors if type(tensor) is not Released]
        # Aliases keep the memory of a replaced tensor from being given to the one that replaces it.
        self.aliases = [tensor.detach() for tensor in filled]
        if copied:
            # Writes through `.data` or NumPy are not counted by torch: samples of the values see all but the smallest.
            flat = [alias if alias.is_contiguous() else alias.mT for alias in self.aliases]
            sampled = [tensor for tensor in flat if tensor.is_contiguous()]
            self.untouched = native.require().Stamps(filled, sampled).same
        else:
            addresses = list(map(torch.Tensor.data_ptr, filled))
            self.untouched = lambda: list(map(torch.Tensor.data_ptr, filled)) == addresses

    def same(self) -> bool:
        """Whether nothing has changed that the engine would not see by itself."""
        for state, children in self.modules:
            # `_altered` inline: this loop is most of what a call of one short text pays besides its products.
            if state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return False
            if state["_modules"] != children:
                return False
        if [state[name] for state, name in self.settings] != self.values:
            return False
        now = [held.get(name) for held, name in self.homes]
        return all(map(is_, now, self.tensors)) and self.untouched()


def refusal(
    parts: tuple[nn.Module, ...], device_type: str, dtypes: tuple[torch.dtype, ...], linears: tuple[type, ...]
) -> str | None:
    """Why an engine that takes tensors of `dtypes` on `device_type`, and one class of `linears`, cannot compute these
    modules."""
    found_dtypes: set[torch.dtype] = set()
    found_linears: set[type] = set()
    for part in parts:
        for name, module in part.named_modules():
            what = f"{name or 'the ' + type(module).__name__.lower()} ({type(module).__name__})"
            if type(module) not in SETTINGS or (type(module) in _LINEARS and type(module) not in linears):
                return f"{what} is not a module that the engine knows"
            altered = _altered(module.__dict__)
            if altered:
                return f"{what} {altered}"
            found_linears |= {type(module)} & set(linears)
            for held, key in homes(module):
                tensor = held[key]
                if tensor is None:
                    return f"{what} lacks a parameter that its class has"
                if type(tensor) is Released:
                    return f"{what} has let its weight go (keep_weights=False), and the model is not what was packed"
                if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.layout != torch.strided:
                    return f"{what} holds a {type(tensor).__name__}, not a plain tensor"
                if tensor.device.type != device_type:
                    return f"{what} is on {tensor.device}"
                if tensor.is_inference():
                    return f"{what} was made in inference_mode: torch does not count its changes"
                if type(module) not in QUANTISED or key == "bias":  # its weights and scales have dtypes of their own
                    found_dtypes.add(tensor.dtype)
    if len(found_linears) != 1:
        return "some of its linear layers have 8-bit weights and some have not"
    if len(found_dtypes) != 1 or not found_dtypes <= set(dtypes):
        return f"the parameters are {' and '.join(sorted(map(str, found_dtypes)))}, the engine needs one of {dtypes}"
    return None
