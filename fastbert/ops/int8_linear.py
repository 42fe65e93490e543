"""y = (q(x) @ W^T) * s(x) * s(W) + b: a linear layer in 8 bits, with q(x) = round(x / s(x)), s(x) = max|x| / 127.

One scale a token and one an output channel, both symmetric; products are summed exactly in int32. Inference only.
"""

from __future__ import annotations

import torch

from fastbert.ops.dispatch import backend_for


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit rows: (R, K) float -> (R, K) int8 in [-127, 127] and (R) fp32 scales with x ~ q * scale."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1) / 127.0
    divisor = torch.where(scale == 0, 1.0, scale)[:, None]
    return (wide / divisor).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification; the sums are exact integers on every device."""
    q, scale = quantize_rows(x)
    if x.device.type == "cpu":
        total = torch._int_mm(q, weight.mT)
    else:  # torch's integer product has alignment rules on GPUs; fp64 holds these sums exactly
        total = q.double() @ weight.mT.double()
    y = total.float() * scale[:, None] * weight_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` with an 8-bit weight, the activations quantised token by token (Zafrir et al. 2019, arXiv 1910.06188).

    Args:
        x: (T, K), any float dtype.
        weight: (N, K) int8, and weight_scale: (N) fp32, as `quantize_rows` gives them for a float weight. On a CPU the
            product is fastest where `weight.mT` is contiguous.
        bias: (N) or None.

    Returns:
        (T, N) in the dtype of `x`; scaling and bias run in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming both sides; K above 2^31 / 127^2, where int32 can overflow.
        RuntimeError: `x` needs a gradient: there is no backward.
    """
    if weight.dtype != torch.int8:
        raise ValueError(f"weight must be int8, got {weight.dtype}: quantise it with quantize_rows")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has {weight.shape[1]} features but x has {x.shape[-1]}")
    if weight_scale.shape != weight.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = (tuple(weight_scale.shape), None if bias is None else tuple(bias.shape))
        raise ValueError(f"weight_scale and bias have shapes {shapes} but weight has {weight.shape[0]} rows")
    if weight.shape[1] > (2**31 - 1) // 127**2:
        raise ValueError(f"{weight.shape[1]} products of 8 bits can overflow an int32 sum")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("int8_linear has no backward: train in float and quantise the result")
    backend = backend_for("int8_linear", x)
    if backend is None:
        return int8_linear_ref(x, weight, weight_scale, bias)
    return backend.int8_linear_fwd(x.contiguous(), weight, weight_scale, bias)
