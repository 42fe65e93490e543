"""y = x / max(|x|, 1e-12), row by row: vectors of length 1, which cosine similarity compares."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert.ops.dispatch import fused


def l2_normalize_ref(x: torch.Tensor) -> torch.Tensor:
    """The specification: in fp32 (fp64 for fp64)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """Scale each row to length 1. A row's bits do not depend on the rows beside it.

    One kernel where a backend has one and no gradient is wanted; gradients are the reference's.

    Args:
        x: (S, D).

    Returns:
        (S, D), fp32 or wider. A row of zeros stays one.

    Raises:
        ValueError: `x` has another number of dimensions.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be (S, D), got {tuple(x.shape)}")
    recorded = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    backend = None if recorded else fused("l2_normalize", x)
    return l2_normalize_ref(x) if backend is None else backend.l2_normalize_fwd(x.contiguous())
