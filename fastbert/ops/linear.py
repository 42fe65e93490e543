"""Linear layers, and with what follows them: gelu(x W^T + b), x W^T + b + r, and the norm of that. Inference only.

One kernel where a backend has one that was measured to be faster than the vendor's GEMM and a kernel after it, else the
two ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.dispatch import fused
from fastbert.ops.gelu import FORMS, gelu


def linear_gelu_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none"
) -> torch.Tensor:
    """The specification; GELU of the wide sum."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x.to(wide), weight.to(wide), bias.to(wide))
    return F.gelu(z, approximate=approximate).to(x.dtype)


def linear_add_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The specification; one rounding."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.linear(x.to(wide), weight.to(wide), bias.to(wide)) + residual.to(wide)).to(x.dtype)


def linear_add_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float,
) -> torch.Tensor:  # fmt: skip
    """The specification; one rounding."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x.to(wide), weight.to(wide), bias.to(wide)) + residual.to(wide)
    return F.layer_norm(z, z.shape[1:], norm_weight.to(wide), norm_bias.to(wide), eps).to(x.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be (T, K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)} but weight has {weight.shape[0]} rows")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"x is {x.dtype} on {x.device} but weight is {weight.dtype} on {weight.device}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError("a fused linear layer has no backward: call it under torch.no_grad()")


def _check_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    expected = (x.shape[0], weight.shape[0])
    if residual.shape != expected or residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, expected {x.dtype} {expected}")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight, bias)`, by a kernel of ours where that is faster.

    Args:
        x: (T, K); weight: (N, K) and bias: (N) in its dtype; sums are fp32.

    Returns:
        (T, N) in the dtype of `x`.

    Raises:
        ValueError, RuntimeError: as `linear_gelu`.
    """
    _check(x, weight, bias)
    backend = fused("linear", x, weight)
    if backend is None:
        return F.linear(x, weight, bias)
    return backend.linear_fwd(x.contiguous(), weight.contiguous(), bias)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """`gelu(F.linear(x, weight, bias))` of a feed-forward layer.

    Args:
        x: (T, K); weight: (N, K) and bias: (N) in its dtype; sums are fp32.
        approximate: as in `fastbert.ops.gelu`.

    Returns:
        (T, N) in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming both sides; an unknown form.
        RuntimeError: a gradient is wanted: there is no backward.
    """
    if approximate not in FORMS:
        raise ValueError(f"approximate must be one of {FORMS}, got {approximate!r}")
    _check(x, weight, bias)
    backend = fused("linear_gelu", x, weight)
    if backend is None:
        return gelu(F.linear(x, weight, bias), approximate=approximate)
    return backend.linear_gelu_fwd(x.contiguous(), weight.contiguous(), bias, approximate)


def linear_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight, bias) + residual`, so that the norm after it reads one tensor.

    Args:
        x: (T, K); weight: (N, K), bias: (N) and residual: (T, N) in its dtype; sums are fp32.

    Returns:
        (T, N) in the dtype of `x`.

    Raises:
        ValueError, RuntimeError: as `linear_gelu`.
    """
    _check(x, weight, bias)
    _check_residual(x, weight, residual)
    backend = fused("linear_add", x, weight)
    if backend is None:
        return F.linear(x, weight, bias) + residual
    return backend.linear_add_fwd(x.contiguous(), weight.contiguous(), bias, residual.contiguous())


def linear_add_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float,
) -> torch.Tensor:  # fmt: skip
    """`F.layer_norm(F.linear(x, weight, bias) + residual)`: for few rows the sums of the product are cut along K, and
    the norm adds them up.

    Args:
        x: (T, K); weight: (N, K), bias: (N) and residual: (T, N) in its dtype; sums are fp32.
        norm_weight, norm_bias: (N); eps: as in `fastbert.ops.add_layer_norm`.

    Returns:
        (T, N) in the dtype of `x`.

    Raises:
        ValueError, RuntimeError: as `linear_gelu`.
    """
    _check(x, weight, bias)
    _check_residual(x, weight, residual)
    backend = fused("linear_add_norm", x, weight)
    if backend is None:
        return add_layer_norm(F.linear(x, weight), residual, norm_weight, norm_bias, eps, x_bias=bias)
    return backend.linear_add_norm_fwd(
        x.contiguous(), weight.contiguous(), bias, residual.contiguous(), norm_weight, norm_bias, eps
    )
