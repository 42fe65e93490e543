"""Linear layers with their epilogues in one kernel: GELU, the residual, row statistics, and the layer norm before.

y = f(x W^T + b) + r, with fp32 sums. A norm folds in as LN(z) W^T + b = (z (gamma W)^T - mean u) / std + (b + W beta)
with u = (gamma W) 1: the GEMM that makes z leaves each row's sum and sum of squares about its mean, tile by tile, and
the next one applies them to its own sums (and to a residual that is LN(z)). z is never normalised in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.kernels.common import on_device
from fastbert.kernels.configs import is_short, linear_programs, linear_tile
from fastbert.kernels.float8 import Float8Rows, float8_of, quantize_rows_fwd
from fastbert.kernels.gelu import gelu_of
from fastbert.kernels.short import short_linear_fwd


class Rows(NamedTuple):
    """Rows before their layer norm, with what makes the norm of them.

    Attributes:
        z: (T, D), what is normalised.
        partials: (tiles, 2, T) fp32: of each tile of `cols` features, sum and sum of squared distances to its mean.
        cols: features of a tile.
        weight, bias, eps: of the norm.
    """

    z: Tensor
    partials: Tensor
    cols: int
    weight: Tensor
    bias: Tensor
    eps: float


@triton.jit
def _statistics(partials, rows, T, eps, D: tl.constexpr, COLS: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of rows, from their tiles' sums (Chan et al. 1979)."""
    mean = tl.zeros(rows.shape, tl.float32)
    for i in range((D + COLS - 1) // COLS):
        mean += tl.load(partials + 2 * i * T + rows, mask=rows < T, other=0.0)
    mean /= D
    squares = tl.zeros(rows.shape, tl.float32)
    for i in range((D + COLS - 1) // COLS):
        n = tl.minimum(COLS, D - i * COLS).to(tl.float32)
        off = tl.load(partials + 2 * i * T + rows, mask=rows < T, other=0.0) / n - mean
        squares += tl.load(partials + (2 * i + 1) * T + rows, mask=rows < T, other=0.0) + n * off * off
    return mean, 1.0 / tl.sqrt(squares / D + eps)


@triton.jit
def _finish(
    acc, first_row, first_col, bias, residual, y, x_scale, weight_scale, mean, rstd, u,
    r_mean, r_rstd, r_weight, r_bias, y_partials, y_scale, T,
    N: tl.constexpr, GELU: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The epilogue of a block of sums, and its store."""
    rows, cols = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    there = cols < N
    end = tl.where(first_col < N, T, 0)  # a half may lie past the last column
    if x_scale is not None:
        if not GROUPED:
            acc *= tl.load(x_scale + rows, mask=rows < T, other=0.0)[:, None]
        acc *= tl.load(weight_scale + cols, mask=there, other=0.0)[None, :]
    if u is not None:
        acc = (acc - mean[:, None] * tl.load(u + cols, mask=there, other=0.0)[None, :]) * rstd[:, None]
    if bias is not None:
        acc += tl.load(bias + cols, mask=there, other=0.0).to(tl.float32)[None, :]
    if GELU != "":
        acc = gelu_of(acc, GELU == "tanh")
    inside = (rows < T)[:, None] & there[None, :]
    if residual is not None:
        r = tl.load(residual + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if r_weight is not None:
            gamma = tl.load(r_weight + cols, mask=there, other=0.0).to(tl.float32)[None, :]
            beta = tl.load(r_bias + cols, mask=there, other=0.0).to(tl.float32)[None, :]
            r = (r - r_mean[:, None]) * r_rstd[:, None] * gamma + beta
        acc += r
    if y_partials is not None:
        n = tl.minimum(COLS, N - first_col).to(tl.float32)
        stored = tl.where(inside, acc.to(y.dtype).to(tl.float32), 0.0)  # of what the next kernel reads
        total = tl.sum(stored, 1)
        off = tl.where(inside, stored - (total / n)[:, None], 0.0)
        at = y_partials + 2 * (first_col // COLS) * T + rows
        tl.store(at, total, mask=rows < end)
        tl.store(at + T, tl.sum(off * off, 1), mask=rows < end)
    if y_scale is not None:
        acc, s = float8_of(tl.where(inside, acc, 0.0))
        tl.store(y_scale + (first_col // COLS) * T + rows, s, mask=rows < end)
    y.store([first_row, first_col], acc.to(y.dtype))


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x, weight, bias, residual, y, x_scale, weight_scale, x_partials, u, x_eps,
    r_partials, r_weight, r_bias, r_eps, y_partials, y_scale, T,
    N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, GELU: tl.constexpr, GROUPED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: every n-th tile of y, so that the next one's rows are on their way while one is finished, in PARTS
    columns of halves; neighbours share their rows of W in L2. x, weight and y are tensor descriptors: what is past
    their ends reads as 0 and is not written. Memory: reads x and W once a tile, writes y; residual, scales and
    statistics only where there are some."""
    num_m, num_n = tl.cdiv(T, ROWS), tl.cdiv(N, COLS)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=x_partials is None):
        group = tile // (8 * num_n)  # eight tiles of rows walk the columns together
        size = tl.minimum(num_m - group * 8, 8)
        first_row = (group * 8 + (tile % (8 * num_n)) % size) * ROWS
        first_col = ((tile % (8 * num_n)) // size) * COLS
        rows = first_row + tl.arange(0, ROWS)
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, K, DEPTH):
            left, right = x.load([first_row, k]), weight.load([first_col, k])
            if GROUPED:  # a step is a group of features, with a scale of its own
                group_scale = tl.load(x_scale + (k // DEPTH) * T + rows, mask=rows < T, other=0.0)
                acc += tl.dot(left, right.T, input_precision="ieee") * group_scale[:, None]
            else:
                acc = tl.dot(left, right.T, acc, input_precision="ieee")
        mean, rstd, r_mean, r_rstd = None, None, None, None
        if x_partials is not None:
            mean, rstd = _statistics(x_partials, rows, T, x_eps, K, P)
        if r_partials is not None:
            r_mean, r_rstd = _statistics(r_partials, rows, T, r_eps, N, P)
        if PARTS == 1:
            _finish(
                acc, first_row, first_col, bias, residual, y, x_scale, weight_scale, mean, rstd, u,
                r_mean, r_rstd, r_weight, r_bias, y_partials, y_scale, T, N, GELU, GROUPED, ROWS, COLS,
            )  # fmt: skip
        else:
            halves = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLS // 2)), (0, 2, 1)))
            for part in tl.static_range(2):
                _finish(
                    halves[part], first_row, first_col + part * (COLS // 2), bias, residual, y, x_scale, weight_scale,
                    mean, rstd, u, r_mean, r_rstd, r_weight, r_bias, y_partials, y_scale, T,
                    N, GELU, GROUPED, ROWS, COLS // 2,
                )  # fmt: skip


def _described(x: Tensor) -> Tensor:
    """What a tensor descriptor takes: rows of whole 16 bytes at such addresses. Others are copied into such rows."""
    left = -x.shape[1] * x.itemsize % 16 // x.itemsize
    return F.pad(x, (0, left)) if left or x.data_ptr() % 16 else x


def _descriptor(x: Tensor, num_cols: int, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, [x.shape[0], num_cols], list(x.stride()), block)


def _launch(
    x: Tensor | Float8Rows, weight: Tensor, bias: Tensor | None, residual: Tensor | Rows | None, gelu: str,
    dtype: torch.dtype, *, weight_scale: Tensor | None = None, norm: tuple[Rows, Tensor] | None = None,
    statistics: bool = False, quantised: bool = False,
) -> tuple[Tensor, Tensor | None, int]:  # fmt: skip
    """y (T, N); with `statistics` its partial ones, or with `quantised` its scales; and the features of a group."""
    x, x_scale, group = x if isinstance(x, Float8Rows) else (x, None, x.shape[1])
    (T, K), N = x.shape, weight.shape[0]
    rows = residual if isinstance(residual, Rows) else None
    added = rows.z if rows is not None else residual
    x_partials, u, x_eps = (None, None, 0.0) if norm is None else (norm[0].partials, norm[1], norm[0].eps)
    folded = rows or (norm[0] if norm is not None else None)
    with on_device(x):
        tile = linear_tile(T, N, x.dtype)
        parts = 2 if tile.cols >= 128 else 1
        cols, depth = tile.cols // parts, group if group < K else tile.depth
        partials, scale = None, None
        y = _described(torch.empty(T, N, dtype=dtype, device=x.device))
        if quantised:
            scale = torch.empty(triton.cdiv(N, cols), T, dtype=torch.float32, device=x.device)
        if statistics:
            partials = torch.empty(triton.cdiv(N, cols), 2, T, dtype=torch.float32, device=x.device)
        num_tiles = triton.cdiv(T, tile.rows) * triton.cdiv(N, tile.cols)
        _linear_kernel[(min(num_tiles, linear_programs()),)](
            _descriptor(_described(x), K, [tile.rows, depth]), _descriptor(_described(weight), K, [tile.cols, depth]),
            bias, added, _descriptor(y, N, [tile.rows, cols]), x_scale, weight_scale, x_partials, u, x_eps,
            *((None, None, None, 0.0) if rows is None else (rows.partials, rows.weight, rows.bias, rows.eps)),
            partials, scale, T, N, K, 1 if folded is None else folded.cols, gelu, group < K,
            tile.rows, tile.cols, depth, parts, **tile.options(),
        )  # fmt: skip
    return y[:, :N].contiguous(), scale if quantised else partials, cols


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `fastbert.ops.linear`."""
    if is_short(x.shape[0], weight.shape):
        return short_linear_fwd(x, weight, bias, "")
    return _launch(x, weight, bias, None, "", x.dtype)[0]


def linear_gelu_fwd(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """See `fastbert.ops.linear`."""
    form = "tanh" if approximate == "tanh" else "erf"
    if is_short(x.shape[0], weight.shape):
        return short_linear_fwd(x, weight, bias, form)
    return _launch(x, weight, bias, None, form, x.dtype)[0]


def linear_add_fwd(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """See `fastbert.ops.linear`."""
    return _launch(x, weight, bias, residual, "", x.dtype)[0]


def linear_rows_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | Rows, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Rows:
    """z = x W^T + b + residual, with the statistics of its rows; a residual of `Rows` is their norm."""
    z, partials, cols = _launch(x, weight, bias, residual, "", x.dtype, statistics=True)
    assert partials is not None
    return Rows(z, partials, cols, norm_weight, norm_bias, eps)


def fold_norm_fwd(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """W' = gamma W in the dtype of W, u = W' 1 (fp32, of the rounded W'), c = b + W beta (fp32)."""
    wide = weight.float()
    folded = (wide * norm_weight.float()).to(weight.dtype)
    return folded, folded.float().sum(1), bias.float() + wide @ norm_bias.float()


def norm_linear_fwd(rows: Rows, folded: tuple[Tensor, Tensor, Tensor], gelu: str = "") -> Tensor:
    """f(LN(z) W^T + b) from `fold_norm_fwd`'s weights; `gelu` is "", "erf" or "tanh"."""
    weight, u, c = folded
    return _launch(rows.z, weight, c, None, gelu, rows.z.dtype, norm=(rows, u))[0]


def float8_linear_fwd(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fastbert.ops.float8_linear`."""
    q, scale = quantize_rows_fwd(x)
    return float8_rows_linear_fwd(Float8Rows(q, scale[None], q.shape[1]), weight, weight_scale, bias, x.dtype)


def float8_rows_linear_fwd(
    x: Float8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x W^T + b of rows that are quantised already, in `dtype`."""
    return _launch(x, weight, bias, None, "", dtype, weight_scale=weight_scale)[0]


def float8_gelu_fwd(
    x: Float8Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, approximate: str
) -> Float8Rows:
    """gelu(x W^T + b), quantised as it is written: a scale for each row of a tile."""
    gelu = "tanh" if approximate == "tanh" else "erf"
    y, scale, cols = _launch(x, weight, bias, None, gelu, x.q.dtype, weight_scale=weight_scale, quantised=True)
    assert scale is not None
    return Float8Rows(y, scale, cols)
