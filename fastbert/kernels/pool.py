"""One vector per sequence, segment by segment, and its gradient; sums in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import begin, on_device
from fastbert.kernels.configs import POOL_TILE, dependent

_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def _segment(cu_seqlens, MODE: tl.constexpr):
    """First token, past-the-end token and divisor of this program's sequence; one token for cls and lasttoken."""
    first = tl.load(cu_seqlens + tl.program_id(0))
    end = tl.load(cu_seqlens + tl.program_id(0) + 1)
    n = tl.maximum(end - first, 1).to(tl.float32)
    if MODE == "cls":
        return first, tl.minimum(first + 1, end), 1.0
    if MODE == "lasttoken":
        return tl.maximum(first, end - 1), end, 1.0
    if MODE == "weightedmean":
        return first, end, 0.5 * n * (n + 1.0)
    if MODE == "mean_sqrt_len_tokens":
        return first, end, tl.sqrt(n)
    return first, end, n


@triton.jit
def _pool_sum_fwd_kernel(
    hidden, cu_seqlens, out, D: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a block of features of one sequence. Memory: reads its tokens once, writes one row."""
    begin(PDL)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first, end, divisor = _segment(cu_seqlens, MODE)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (cols < D)
        values = tl.load(hidden + rows.to(tl.int64)[:, None] * D + cols, mask=inside, other=0.0).to(tl.float32)
        if MODE == "weightedmean":
            values *= (rows - first + 1).to(tl.float32)[:, None]
        total += values
    tl.store(out + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(total, 0) / divisor, mask=cols < D)


@triton.jit
def _larger(a, i, b, j):
    """The larger of two values with their rows; of equals the earlier row; NaN is larger than any number."""
    a_nan, b_nan = a != a, b != b
    same = (a == b) | (a_nan & b_nan)
    left = tl.where(same, i < j, a_nan | ((a > b) & ~b_nan))
    return tl.where(left, a, b), tl.where(left, i, j)


@triton.jit
def _pool_max_fwd_kernel(
    hidden, cu_seqlens, out, argmax, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """One program: a block of features of one sequence. Memory: reads its tokens once, writes a row and its argmax."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first, end, _ = _segment(cu_seqlens, "max")
    top = tl.full((ROWS, COLS), -float("inf"), tl.float32)
    at = tl.full((ROWS, COLS), _NO_ROW, tl.int32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (cols < D)
        values = tl.load(hidden + rows.to(tl.int64)[:, None] * D + cols, mask=inside, other=-float("inf"))
        top, at = _larger(top, at, values.to(tl.float32), tl.where(inside, rows[:, None], _NO_ROW))
    best, row = tl.reduce((top, at), 0, _larger)
    offsets = tl.program_id(0).to(tl.int64) * D + cols
    tl.store(out + offsets, tl.where(row == _NO_ROW, 0.0, best), mask=cols < D)
    tl.store(argmax + offsets, tl.where(row == _NO_ROW, -1, row), mask=cols < D)


@triton.jit
def _pool_bwd_kernel(
    dout, cu_seqlens, argmax, dhidden, D: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """One program: a block of features of one sequence. Memory: reads one row, writes the gradient of its tokens."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    offsets = tl.program_id(0).to(tl.int64) * D + cols
    begin = tl.load(cu_seqlens + tl.program_id(0))
    stop = tl.load(cu_seqlens + tl.program_id(0) + 1)
    first, end, divisor = _segment(cu_seqlens, MODE)
    g = tl.load(dout + offsets, mask=cols < D, other=0.0).to(tl.float32)
    for start in range(begin, stop, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < stop)[:, None] & (cols < D)
        if MODE == "max":
            row = tl.load(argmax + offsets, mask=cols < D, other=-1)
            d = tl.where(rows[:, None] == row[None, :], g[None, :], 0.0)
        else:
            d = tl.where(((rows >= first) & (rows < end))[:, None], (g / divisor)[None, :], 0.0)
            if MODE == "weightedmean":
                d *= (rows - first + 1).to(tl.float32)[:, None]
        tl.store(dhidden + rows.to(tl.int64)[:, None] * D + cols, d, mask=inside)


def pool_fwd(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """out (S, D) and, for max, the token (S, D) int32 of each maximum (the first of equals), -1 if there is none."""
    S, D = cu_seqlens.numel() - 1, hidden.shape[1]
    out = hidden.new_empty(S, D)
    argmax = torch.empty_like(out, dtype=torch.int32) if mode == "max" else None
    rows, cols = POOL_TILE.rows, POOL_TILE.cols
    grid = (S, triton.cdiv(D, cols))
    with on_device(hidden):
        if mode == "max":
            _pool_max_fwd_kernel[grid](
                hidden, cu_seqlens.contiguous(), out, argmax, D, rows, cols, **POOL_TILE.options()
            )
        else:
            _pool_sum_fwd_kernel[grid](
                hidden, cu_seqlens.contiguous(), out, D, mode, rows, cols, dependent(),
                **POOL_TILE.options(dependent()),
            )  # fmt: skip
    return out, argmax


def pool_bwd(dout: Tensor, cu_seqlens: Tensor, mode: str, num_tokens: int, argmax: Tensor | None) -> Tensor:
    """dhidden (T, D)."""
    S, D = dout.shape
    dhidden = dout.new_empty(num_tokens, D)
    rows, cols = POOL_TILE.rows, POOL_TILE.cols
    with on_device(dout):
        _pool_bwd_kernel[(S, triton.cdiv(D, cols))](
            dout, cu_seqlens.contiguous(), argmax, dhidden, D, mode, rows, cols, **POOL_TILE.options()
        )
    return dhidden
