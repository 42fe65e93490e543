"""Loads the C++ extension and offers it as the native backend."""

from __future__ import annotations

import torch


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether this backend computes `op` on that device and dtype."""
    return False
