"""y = (q(x) W^T) * s(x) * s(W) + b: a linear layer in float8 e4m3, with q(x) = x / s(x), s(x) = max|x| / 448.

One scale a token and one an output channel (Micikevicius et al. 2022, arXiv 2209.05433). Inference only.
"""

from __future__ import annotations

import torch

from fastbert.ops.dispatch import backend_for

FLOAT8, FLOAT8_MAX = torch.float8_e4m3fn, 448.0


def quantize_rows_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, K) float -> (R, K) float8 e4m3 and (R) fp32 scales with x ~ q * scale; a row's largest value becomes 448."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1) / FLOAT8_MAX
    divisor = torch.where(scale == 0, 1.0, scale)[:, None]
    return (wide / divisor).to(FLOAT8), scale


def float8_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification; sums in fp32 (fp64 for fp64 inputs) of exact products."""
    q, scale = quantize_rows_float8(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (q.to(wide) @ weight.to(wide).mT) * scale.to(wide)[:, None] * weight_scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def float8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` with a float8 weight, the activations quantised token by token.

    Args:
        x: (T, K), any float dtype.
        weight: (N, K) float8_e4m3fn and weight_scale: (N) fp32, as `quantize_rows_float8` gives them.
        bias: (N) or None.

    Returns:
        (T, N) in the dtype of `x`; scaling and bias run in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming both sides.
        RuntimeError: `x` needs a gradient: there is no backward.
    """
    if weight.dtype != FLOAT8:
        raise ValueError(f"weight must be {FLOAT8}, got {weight.dtype}: quantise it with quantize_rows_float8")
    if x.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has {weight.shape[1]} features but x has shape {tuple(x.shape)}")
    if weight_scale.shape != weight.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = (tuple(weight_scale.shape), None if bias is None else tuple(bias.shape))
        raise ValueError(f"weight_scale and bias have shapes {shapes} but weight has {weight.shape[0]} rows")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("float8_linear has no backward: train in float and quantise the result")
    backend = backend_for("float8_linear", x)
    if backend is None:
        return float8_linear_ref(x, weight, weight_scale, bias)
    return backend.float8_linear_fwd(x.contiguous(), weight.contiguous(), weight_scale, bias)
