"""Rows in float8 e4m3 with fp32 scales: one for each row, or one for each group of a row's features.

A kernel that makes rows quantises them as it writes them: a norm has the whole row in hand, a GEMM a tile of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import on_device
from fastbert.kernels.configs import quantize_tile

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = tl.constexpr(448.0)


class Float8Rows(NamedTuple):
    """x ~ q * scale.

    Attributes:
        q: (T, K) float8; the largest value of a group is 448.
        scale: (groups, T) fp32.
        cols: features of a group.
    """

    q: Tensor
    scale: Tensor
    cols: int


def new_rows(T: int, K: int, cols: int, device: torch.device) -> Float8Rows:
    """Room for T rows of K features in groups of `cols`."""
    scale = torch.empty(triton.cdiv(K, cols), T, dtype=torch.float32, device=device)
    return Float8Rows(torch.empty(T, K, dtype=FLOAT8, device=device), scale, cols)


@triton.jit
def float8_of(values):
    """Each row of a block, 0 where nothing is, as values up to 448, and its scale."""
    scale = tl.max(tl.abs(values), 1) / FLOAT8_MAX
    return values / tl.where(scale == 0.0, 1.0, scale)[:, None], scale


@triton.jit(do_not_specialize=["T"])
def _quantize_kernel(x, q, scale, T, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program: a few whole rows. Memory: reads x, writes a byte for each value and a scale a row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < T)[:, None] & (cols < K)
    offsets = rows.to(tl.int64)[:, None] * K + cols
    values, s = float8_of(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32))
    tl.store(q + offsets, values.to(q.dtype.element_ty), mask=inside)
    tl.store(scale + rows, s, mask=rows < T)


def quantize_rows_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) -> (T, K) float8 e4m3 and (T) fp32 scales: row maxima become 448."""
    T, K = x.shape
    q, scale, _ = new_rows(T, K, K, x.device)
    with on_device(x):
        tile = quantize_tile(K)
        _quantize_kernel[(triton.cdiv(T, tile.rows),)](x, q, scale, T, K, tile.rows, tile.cols, **tile.options())
    return q, scale[0]
