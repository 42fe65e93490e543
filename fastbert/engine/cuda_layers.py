"""The forms in which the CUDA engine computes a model's layers, (T, D) -> (T, D): all are `Layer.forward`.

* `Chain`: a GEMM and a kernel after it, or in one where that was measured to pay (`fused`).
* `Folded`: no norm is a kernel: a GEMM leaves the statistics of the rows it makes, the next one applies them. Its
  weights carry the norm's, so they are copies.
* `Float8`: products of 8 bits, their operands quantised by the kernel that makes them.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from fastbert import kernels
from fastbert.models.activations import ACTIVATIONS
from fastbert.models.encoder import AddLayerNorm, FeedForward, Layer
from fastbert.models.quantize import Float8Linear
from fastbert.ops import add_layer_norm, attention
from fastbert.ops.dispatch import fused
from fastbert.ops.linear import linear, linear_add, linear_add_norm, linear_gelu
from fastbert.packing import PackedBatch

_FORMS = {ACTIVATIONS["gelu"]: "none", ACTIVATIONS["gelu_new"]: "tanh"}


class Form(Protocol):
    """Layers, ready to run. `copies`: whether it holds copies of weights, which a write to one makes stale."""

    copies: bool

    def __call__(self, x: torch.Tensor, batch: PackedBatch, rel_bias: torch.Tensor | None) -> torch.Tensor:
        """(T, D) -> (T, D)."""


def form_of(layers: list[Layer]) -> Form:
    """The form that is measured to be the fastest on this device for these weights."""
    if not layers:
        return Chain(layers)
    first = layers[0].attention.qkv
    x = first.bias if isinstance(first, Float8Linear) else first.weight
    if isinstance(first, Float8Linear):
        known = all(layer.feed_forward.act in _FORMS for layer in layers)
        return Float8(layers) if known and x is not None and fused("float8_linear", x) is kernels else Chain(layers)
    return Folded(layers) if fused("norm_linear", x) is kernels else Chain(layers)


def _context(layer: Layer, qkv: torch.Tensor, batch: PackedBatch, rel_bias: torch.Tensor | None) -> torch.Tensor:
    """(T, 3 D) -> (T, D)."""
    H = layer.attention.num_heads
    qkv = qkv.view(qkv.shape[0], 3, H, qkv.shape[1] // (3 * H))
    return attention(qkv, batch.cu_seqlens, batch.max_seqlen, rel_bias=rel_bias).flatten(1)


def _fuses(module: nn.Module, op: str, x: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether a kernel of ours computes this layer, with what follows it, faster."""
    if type(module) is not nn.Linear or module.bias is None or module.weight.dtype != x.dtype:
        return False
    return fused(op, x, module.weight) is not None


def _linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias) if _fuses(module, "linear", x) else module(x)


def _add_norm(module: nn.Module, x: torch.Tensor, residual: torch.Tensor, norm: AddLayerNorm) -> torch.Tensor:
    """LN(module(x) + residual)."""
    if _fuses(module, "linear_add_norm", x):
        return linear_add_norm(x, module.weight, module.bias, residual, norm.weight, norm.bias, norm.eps)
    if _fuses(module, "linear_add", x):
        return norm(linear_add(x, module.weight, module.bias, residual))
    return norm(_linear(module, x), residual)


def _inner(feed_forward: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """act(intermediate(x))."""
    module, form = feed_forward.intermediate, _FORMS.get(feed_forward.act)
    if form is not None and _fuses(module, "linear_gelu", x):
        return linear_gelu(x, module.weight, module.bias, form)
    return feed_forward.act(_linear(module, x))


class Chain:
    """One after the other."""

    copies = False

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers

    def __call__(self, x: torch.Tensor, batch: PackedBatch, rel_bias: torch.Tensor | None) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        for layer in self._layers:
            context = _context(layer, _linear(layer.attention.qkv, x), batch, rel_bias)
            x = _add_norm(layer.attention.dense, context, x, layer.attention_LayerNorm)
            x = _add_norm(layer.feed_forward.output, _inner(layer.feed_forward, x), x, layer.output_LayerNorm)
        return x


class Folded:
    """Each norm but the last in the GEMMs around it."""

    copies = True

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._weights: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}  # shared layers fold once
        for before, layer in zip([None, *layers], layers, strict=False):
            if before is not None:
                self._fold(before.output_LayerNorm, layer.attention.qkv)
            self._fold(layer.attention_LayerNorm, layer.feed_forward.intermediate)

    def _fold(self, norm: AddLayerNorm, linear: nn.Linear) -> None:
        key = id(norm), id(linear)
        if key not in self._weights:
            with torch.no_grad():
                self._weights[key] = kernels.fold_norm_fwd(linear.weight, linear.bias, norm.weight, norm.bias)

    def __call__(self, x: torch.Tensor, batch: PackedBatch, rel_bias: torch.Tensor | None) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        residual: Any = x  # and rows before their norm from then on
        qkv = self._layers[0].attention.qkv(x)
        for i, layer in enumerate(self._layers):
            context = _context(layer, qkv, batch, rel_bias)
            dense, norm, feed_forward = layer.attention.dense, layer.attention_LayerNorm, layer.feed_forward
            rows = kernels.linear_rows_fwd(
                context, dense.weight, dense.bias, residual, norm.weight, norm.bias, norm.eps
            )
            form = {"none": "erf", "tanh": "tanh"}.get(_FORMS.get(feed_forward.act, ""), "")
            inner = kernels.norm_linear_fwd(rows, self._weights[id(norm), id(feed_forward.intermediate)], form)
            inner = inner if form else feed_forward.act(inner)
            output, norm = feed_forward.output, layer.output_LayerNorm
            residual = kernels.linear_rows_fwd(
                inner, output.weight, output.bias, rows, norm.weight, norm.bias, norm.eps
            )
            if i + 1 < len(self._layers):
                after = self._layers[i + 1].attention.qkv
                qkv = kernels.norm_linear_fwd(residual, self._weights[id(norm), id(after)])
        return add_layer_norm(residual.z, None, norm.weight, norm.bias, norm.eps)


class Float8:
    """Norm and GELU write what the next GEMM multiplies; attention's output is quantised by a kernel of its own."""

    copies = False

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers

    def __call__(self, x: torch.Tensor, batch: PackedBatch, rel_bias: torch.Tensor | None) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        rows = None
        for layer in self._layers:
            feed_forward, norm = layer.feed_forward, layer.attention_LayerNorm
            qkv = layer.attention.qkv(x) if rows is None else _product(rows, layer.attention.qkv, x.dtype)
            y = layer.attention.dense(_context(layer, qkv, batch, rel_bias))
            x, rows = kernels.add_layer_norm_float8_fwd(y, x, norm.weight, norm.bias, norm.eps)
            inner, norm = feed_forward.intermediate, layer.output_LayerNorm
            form = _FORMS[feed_forward.act]
            inner = kernels.float8_gelu_fwd(rows, inner.weight, inner.weight_scale, inner.bias, form)
            y = _product(inner, feed_forward.output, x.dtype)
            x, rows = kernels.add_layer_norm_float8_fwd(y, x, norm.weight, norm.bias, norm.eps)
        return x


def _product(rows: object, linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """linear(x) of rows that are quantised already."""
    return kernels.float8_rows_linear_fwd(rows, linear.weight, linear.weight_scale, linear.bias, dtype)
