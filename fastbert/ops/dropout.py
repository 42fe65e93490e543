"""Dropout as a pure function of (seed, position): one 32-bit integer hash, the same in torch, C++ and Triton.

    keep(seed, row, col) = hash(hash(row ^ hash(seed)) + col) >= p * 2^32

No mask is stored: the backward pass computes the same bits again. `hash` is the "lowbias32" finaliser of
Chris Wellons' hash prospector (two multiply-xorshift rounds, bias 0.17 of 2^32).
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
Seed = int | torch.Tensor  # an int; while torch.compile traces a call, a 0-d int64 tensor on the CPU


def hash32(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 of int64 `x` taken modulo 2^32; int64 in [0, 2^32)."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def dropout_keep(seed: Seed, rows: torch.Tensor, cols: torch.Tensor, p: float) -> torch.Tensor:
    """Boolean keep mask, shape of `rows` broadcast with `cols`.

    Args:
        seed: non-negative integer; its low 32 bits count.
        rows, cols: int64 positions. Hidden states: (token, feature). Attention: (token * H + head, key in sequence).
        p: probability of dropping, in [0, 1).
    """
    key = hash32(torch.as_tensor(seed, dtype=torch.int64, device=rows.device))
    return hash32(hash32(rows ^ key) + cols) >= int(p * 2**32)


def dropout_ref(x: torch.Tensor, p: float, seed: Seed) -> torch.Tensor:
    """`x` (T, D) with entries dropped with probability `p` and the others scaled by 1 / (1 - p)."""
    if p == 0.0:
        return x
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    cols = torch.arange(x.shape[1], device=x.device)
    return torch.where(
        dropout_keep(seed, rows, cols, p), x / (1.0 - p), torch.zeros((), dtype=x.dtype, device=x.device)
    )


def draw_seed(p: float) -> Seed:
    """A fresh seed from torch's CPU generator (reproducible under `torch.manual_seed`, no device sync); 0 if p is 0."""
    if torch.compiler.is_compiling():
        return torch.randint(0, 2**32 if p > 0.0 else 1, (), dtype=torch.int64)
    return int(torch.randint(0, 2**32, (), dtype=torch.int64)) if p > 0.0 else 0


def check_dropout(p: float) -> None:
    """Raise ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
