"""The Triton backend: raw functions on tensors, `<op>_fwd` and `<op>_bwd`; no autograd, no modules, no dispatch."""

from __future__ import annotations

import torch

DTYPES: dict[str, tuple[torch.dtype, ...]] = {}  # op -> dtypes its kernel takes; the first kernel adds the first row


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend computes `op` on that device and dtype."""
    return device_type == "cuda" and dtype in DTYPES.get(op, ())


def require() -> None:
    """Nothing to check before the first kernel."""
