"""y = LN(residual + dropout(x + x_bias)), LN(z) = (z - mean(z)) / sqrt(var(z) + eps) * w + b over the last axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops.dispatch import backend_for, check_devices
from fastbert.ops.dropout import Seed, check_dropout, dropout_ref


def add_layer_norm_ref(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Seed = 0,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification: sum, statistics and affine in fp32 (fp64 for fp64), one rounding at the end."""
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = torch.promote_types(out_dtype, torch.float32)
    z = x.to(wide) if x_bias is None else x.to(wide) + x_bias.to(wide)
    z = dropout_ref(z, dropout_p, seed)
    if residual is not None:
        z = z + residual.to(wide)
    return F.layer_norm(z, z.shape[-1:], weight.to(wide), bias.to(wide), eps).to(out_dtype)


class AddLayerNormFunction(torch.autograd.Function):
    """Saves x, residual and the row statistics; z and the dropout bits are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        x: torch.Tensor,
        x_bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        dropout_p: float,
        seed: Seed,
    ) -> torch.Tensor:
        y, mean, rstd = backend.add_layer_norm_fwd(x, x_bias, residual, weight, bias, eps, dropout_p, seed)
        ctx.backend, ctx.dropout_p, ctx.seed = backend, dropout_p, seed
        ctx.save_for_backward(x, x_bias, residual, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        gradients = ctx.backend.add_layer_norm_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.dropout_p, ctx.seed)
        return None, *gradients, None, None, None


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Seed = 0,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dropout, residual addition and layer normalisation in one op (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: (T, D) output of the sublayer.
        residual: (T, D) input of the sublayer, or None for a plain layer norm.
        weight, bias: (D).
        eps: added to the variance inside the root, in fp32 whatever the dtype (1e-12 is zero in fp16).
        dropout_p, seed: dropout on `x + x_bias` before the sum; see `fastbert.ops.dropout`.
        x_bias: (D) or None: the bias of the linear layer before, added here so that its GEMM need not; its gradient is
            summed as dx is written, not read again.

    Returns:
        (T, D) in the wider dtype of `x` and `residual`. Statistics are fp32 (fp64 for fp64 inputs). A kernel takes
        `x` in half precision with an fp32 residual and fp32 parameters too, as autocast has them.
        Saved for backward: `x`, `residual`, mean and 1/std of each row (T); never the dropout mask.

    Raises:
        ValueError: shapes that do not match, or a dropout probability outside [0, 1).
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has {tuple(weight.shape)} and bias {tuple(bias.shape)} features but x has {x.shape[-1]}"
        )
    if x_bias is not None and x_bias.shape != x.shape[-1:]:
        raise ValueError(f"x_bias has shape {tuple(x_bias.shape)} but x has {x.shape[-1]} features")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} but x has {tuple(x.shape)}")
    check_dropout(dropout_p)
    check_devices(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    others = [t.dtype for t in (residual, weight, bias, x_bias) if t is not None]
    known = all(dtype in (x.dtype, torch.float32) for dtype in others)
    backend = backend_for("add_layer_norm", x) if known else None
    if backend is None:
        return add_layer_norm_ref(x, residual, weight, bias, eps, dropout_p, seed, x_bias)
    residual = None if residual is None else residual.contiguous()
    return AddLayerNormFunction.apply(backend, x.contiguous(), x_bias, residual, weight, bias, eps, dropout_p, seed)
