"""gelu(x + b): 0.5 z (1 + erf(z / sqrt 2)), or its tanh form 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops.dispatch import backend_for, check_devices

FORMS = ("none", "tanh")


def gelu_ref(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """The specification; fp32 arithmetic for half-precision inputs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return F.gelu(z, approximate=approximate).to(x.dtype)


class GeluFunction(torch.autograd.Function):
    """Saves x and the bias; the backward pass computes z again."""

    @staticmethod
    def forward(ctx: Any, backend: Any, x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
        ctx.backend, ctx.approximate = backend, approximate
        ctx.save_for_backward(x, bias)
        return backend.gelu_fwd(x, bias, approximate)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = ctx.backend.gelu_bwd(dy.contiguous(), x, bias, ctx.approximate)
        return None, dx, dbias, None


def gelu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """Gaussian error linear unit of `x + bias` (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    Args:
        x: (T, F), any float dtype; half precision is computed in fp32.
        bias: (F) or None: the bias of the linear layer before, added here so that its GEMM need not.
        approximate: `"none"` for the erf form (BERT's `hidden_act="gelu"`), `"tanh"` for `gelu_new`.

    Returns:
        (T, F) in the dtype of `x`.
        Saved for backward: `x` and `bias`; nothing else.

    Raises:
        ValueError: unknown form, or a bias that does not match the last axis.
    """
    if approximate not in FORMS:
        raise ValueError(f"approximate must be one of {FORMS}, got {approximate!r}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)} but x has {x.shape[-1]} features")
    check_devices(x=x, bias=bias)
    backend = backend_for("gelu", x)
    if backend is None:
        return gelu_ref(x, bias, approximate)
    return GeluFunction.apply(backend, x.contiguous(), bias, approximate)
