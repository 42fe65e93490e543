"""Trained models to 8-bit inference: swaps linear layers for int8 or float8 ones. It trains and calibrates nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fastbert.models.encoder import Layer
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops.float8_linear import float8_linear, quantize_rows_float8
from fastbert.ops.int8_linear import int8_linear, quantize_rows

M = TypeVar("M", bound=PreTrainedModel)

# What 8-bit activations hurt most: the values of attention, and the first product of a pass. Queries and keys take them
# well: a softmax forgives. Mean cosine to fp32 over 300 real texts, MiniLM (90, all-mpnet-base-v2): 0.9976 (0.9978)
# with 8 bits everywhere, 0.9989 (0.9986) with the values' activations kept, the same with all of qkv's kept.
SENSITIVE = ("values", "embedding_hidden_mapping_in", "embeddings_project")

# Of how far an input channel reaches, the part that its scale moves into the weights (the paper's alpha).
_MIGRATED = 0.85


def spread(norm: nn.LayerNorm, linear: nn.Linear) -> torch.Tensor:
    """(K) fp32: what the inputs of `linear`, the outputs of `norm`, are multiplied by before they are rounded, so that
    no channel takes the others' levels. SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) without its calibration: a
    channel reaches three standard deviations from its mean, and the norm's parameters say both."""
    reach = norm.bias.detach().float().abs() + 3 * norm.weight.detach().float().abs()
    scale = linear.weight.detach().float().abs().amax(0) ** (1 - _MIGRATED) / reach**_MIGRATED
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


class Int8Linear(nn.Module):
    """An `nn.Linear` whose weight is int8 with one fp32 scale per output channel; a quarter of the memory.

    Attributes:
        weight: (N, K) int8, of the linear layer's weight divided by `input_scale`.
        weight_scale: (N) fp32.
        input_scale: (K) fp32 by which inputs are multiplied before they are rounded; ones unless given.
        bias: (N) fp32 or None.
        num_narrow: leading output features whose input is rounded to 8 bits, row by row, for an integer product. For
            the others it stays as it is (an engine rounds it to 16 bits).
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, linear: nn.Linear, num_narrow: int | None = None, input_scale: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.num_narrow = linear.out_features if num_narrow is None else num_narrow
        if not 0 <= self.num_narrow <= linear.out_features:
            raise ValueError(f"num_narrow is {num_narrow} but there are {linear.out_features} output features")
        given = linear.weight.detach()
        if input_scale is None:
            input_scale = torch.ones(given.shape[1], device=given.device)
        weight, scale = quantize_rows(given.float() / input_scale)
        # Shape (N, K), memory (K, N): torch's int8 product on a CPU is 3x faster so (Zen 5, 2048x384x1536).
        self.register_buffer("weight", weight.mT.contiguous().mT)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (T, N) in the dtype of `x`."""
        n, parts, scaled = self.num_narrow, [], x.float() * self.input_scale
        if n > 0:
            parts.append(int8_linear(scaled, *self._part(slice(n))).to(x.dtype))
        if n < len(self.weight):
            weight, scale, bias = self._part(slice(n, None))
            parts.append(F.linear(scaled, weight * scale[:, None], bias).to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _part(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.weight[rows], self.weight_scale[rows], None if self.bias is None else self.bias[rows]


class Float8Linear(nn.Module):
    """An `nn.Linear` whose weight is float8 e4m3 with one fp32 scale per output channel, for GPUs that multiply it.

    Attributes:
        weight: (N, K) float8_e4m3fn.
        weight_scale: (N) fp32.
        bias: (N) in the dtype of the linear layer, or None.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows_float8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, K) -> (T, N) in the dtype of `x`."""
        return float8_linear(x, self.weight, self.weight_scale, self.bias)


def _swap(model: PreTrainedModel, make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put what `make(name, linear)` gives in the place of the encoder's linear layers."""
    parents: list[nn.Module] = [model, *model.get_submodule("encoder").modules()]
    swapped = 0
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(name, child))
                swapped += 1
    if not swapped:
        raise ValueError(f"{type(model).__name__} has no float linear layer: already in int8 or float8?")


def quantize_int8(model: M, sensitive: Collection[str] = SENSITIVE) -> M:
    """Swap, in place, the linear layers of the encoder for `Int8Linear`; the float weights are let go.

    Args:
        model: a trained model; embeddings, norms, pooler and heads stay as they are.
        sensitive: names of linear layers whose activations keep 16 bits; "values" is the last third of "qkv".

    Raises:
        ValueError: the model's encoder has no linear layer that could be swapped (already quantised?).
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    before = {layer.feed_forward.intermediate: layer.attention_LayerNorm for layer in layers}

    def make(name: str, linear: nn.Linear) -> nn.Module:
        wide = linear.out_features if name in sensitive else 0
        if name == "qkv" and "values" in sensitive:
            wide = wide or linear.out_features // 3
        scale = spread(before[linear], linear) if linear in before else None
        return Int8Linear(linear, linear.out_features - wide, scale)

    _swap(model, make)
    return model.eval()


def quantize_float8(model: M) -> M:
    """Swap, in place, the linear layers of the encoder for `Float8Linear`; the float weights are let go.

    Args:
        model: a trained model; embeddings, norms, pooler and heads stay as they are.

    Raises:
        ValueError: the model's encoder has no linear layer that could be swapped (already quantised?).
    """
    _swap(model, lambda name, linear: Float8Linear(linear))
    return model.eval()


_PRECISIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int8": ("float32", quantize_int8),
    "float8": ("bfloat16", quantize_float8),
}


def loaded_dtype(name: str) -> str:
    """The dtype in which weights are loaded for a precision: itself, unless `quantize` makes it from another."""
    return _PRECISIONS[name][0] if name in _PRECISIONS else name


def quantize(model: M, name: str) -> M:
    """Swap the model's linear layers, in place, if the precision is one of 8 bits."""
    return _PRECISIONS[name][1](model) if name in _PRECISIONS else model
