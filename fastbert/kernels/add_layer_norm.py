"""LN(residual + dropout(x + x_bias)) and its gradient; z and the dropout bits are computed again in backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import begin, dropout_args, dropout_keep, on_device
from fastbert.kernels.configs import dependent, norm_bwd_tile, norm_parts_tile, norm_tile, num_partials
from fastbert.kernels.float8 import Float8Rows, float8_of, new_rows


@triton.jit
def row_statistics(z, inside, eps, D: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of each row of z, where `inside`; the variance is of centred values."""
    mean = tl.sum(z, 1) / D
    centred = tl.where(inside, z - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)


@triton.jit
def layer_norm_grad(dy, z, weight, mean, rstd, inside, D: tl.constexpr):
    """dz of y = normed * weight + bias, and `normed`; dy is zero outside."""
    normed = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
    g = dy * weight
    along = tl.sum(g * normed, 1) / D
    return (g - (tl.sum(g, 1) / D)[:, None] - normed * along[:, None]) * rstd[:, None], normed


@triton.jit
def _sum(x, parts, part_size, x_bias, residual, offsets, inside, rows, cols, seed, threshold, keep_scale):
    z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, parts):
        z += tl.load(x + part * part_size + offsets, mask=inside, other=0.0)
    if x_bias is not None:
        z += x_bias
    if seed is not None:
        z = tl.where(dropout_keep(seed, threshold, rows[:, None], cols[None, :]), z * keep_scale, 0.0)
    if residual is not None:
        z += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["seed", "threshold", "T"])
def _add_layer_norm_fwd_kernel(
    x, x_bias, residual, weight, bias, y, q, scale, mean, rstd, eps, seed, threshold, keep_scale, T,
    D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a few whole rows. Memory: reads x (in PARTS that are summed) and residual, writes y (and y in
    float8); z lives in registers."""
    begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < T)[:, None] & (cols < D)
    offsets = rows.to(tl.int64)[:, None] * D + cols
    if x_bias is not None:
        x_bias = tl.load(x_bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    z = _sum(x, PARTS, T.to(tl.int64) * D, x_bias, residual, offsets, inside, rows, cols, seed, threshold, keep_scale)
    mu, r = row_statistics(z, inside, eps, D)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    out = ((z - mu[:, None]) * r[:, None] * w + b).to(y.dtype.element_ty)
    tl.store(y + offsets, out, mask=inside)
    if q is not None:
        values, s = float8_of(tl.where(inside, out.to(tl.float32), 0.0))
        tl.store(q + offsets, values.to(q.dtype.element_ty), mask=inside)
        tl.store(scale + rows, s, mask=rows < T)
    if mean is not None:
        tl.store(mean + rows, mu, mask=rows < T)
        tl.store(rstd + rows, r, mask=rows < T)


@triton.jit(do_not_specialize=["seed", "threshold", "T"])
def _add_layer_norm_bwd_kernel(
    dy, x, x_bias, residual, weight, mean, rstd, dx, dresidual, partials, seed, threshold, keep_scale, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every n-th group of rows. Memory: reads dy, x and residual, writes dx (and dresidual where it
    differs), and one partial sum of dweight, dbias and dx_bias a program."""
    cols = tl.arange(0, COLS)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    if x_bias is not None:
        x_bias = tl.load(x_bias + cols, mask=cols < D, other=0.0).to(tl.float32)
        dx_bias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < T)[:, None] & (cols < D)
        offsets = rows.to(tl.int64)[:, None] * D + cols
        z = _sum(x, 1, 0, x_bias, residual, offsets, inside, rows, cols, seed, threshold, keep_scale)
        mu = tl.load(mean + rows, mask=rows < T, other=0.0)
        r = tl.load(rstd + rows, mask=rows < T, other=0.0)
        g = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        dz, normed = layer_norm_grad(g, z, w, mu, r, inside, D)
        dweight += g * normed
        dbias += g
        if dresidual is not None:
            tl.store(dresidual + offsets, dz, mask=inside)
        if seed is not None:
            dz = tl.where(dropout_keep(seed, threshold, rows[:, None], cols[None, :]), dz * keep_scale, 0.0)
        tl.store(dx + offsets, dz, mask=inside)
        if x_bias is not None:
            dx_bias += tl.where(inside, dz, 0.0)
    partials += tl.program_id(0).to(tl.int64) * D + cols
    n = tl.num_programs(0).to(tl.int64) * D
    tl.store(partials, tl.sum(dweight, 0), mask=cols < D)
    tl.store(partials + n, tl.sum(dbias, 0), mask=cols < D)
    if x_bias is not None:
        tl.store(partials + 2 * n, tl.sum(dx_bias, 0), mask=cols < D)


def add_layer_norm_fwd(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of the residual, and mean and 1/std (fp32) of each row."""
    T, D = x.shape[:-1].numel(), x.shape[-1]
    y = torch.empty_like(x if residual is None else residual)
    mean, rstd = torch.empty(2, T, dtype=torch.float32, device=x.device)
    with on_device(x):
        tile = norm_tile(D, x.dtype)
        _add_layer_norm_fwd_kernel[(triton.cdiv(T, tile.rows),)](
            x, x_bias, residual, weight.contiguous(), bias.contiguous(), y, None, None, mean, rstd, eps,
            *dropout_args(dropout_p, seed), T, D, 1, tile.rows, tile.cols, dependent(), **tile.options(dependent()),
        )  # fmt: skip
    return y, mean, rstd


def add_layer_norm_parts_fwd(
    parts: Tensor, x_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """y for the sum of (P, T, D) fp32 parts; inference only."""
    P, T, D = parts.shape
    y = torch.empty_like(residual)
    with on_device(parts):
        tile = norm_parts_tile(D)
        _add_layer_norm_fwd_kernel[(triton.cdiv(T, tile.rows),)](
            parts, x_bias, residual, weight.contiguous(), bias.contiguous(), y, None, None, None, None, eps,
            *dropout_args(0.0, 0), T, D, P, tile.rows, tile.cols, dependent(), **tile.options(dependent()),
        )  # fmt: skip
    return y


def add_layer_norm_float8_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Float8Rows]:
    """y for the next residual, and y in float8 for the next GEMM; inference only."""
    T, D = x.shape
    y, rows = torch.empty_like(x), new_rows(T, D, D, x.device)
    with on_device(x):
        tile = norm_tile(D, x.dtype)
        _add_layer_norm_fwd_kernel[(triton.cdiv(T, tile.rows),)](
            x, None, residual, weight.contiguous(), bias.contiguous(), y, rows.q, rows.scale, None, None, eps,
            *dropout_args(0.0, 0), T, D, 1, tile.rows, tile.cols, dependent(), **tile.options(dependent()),
        )  # fmt: skip
    return y, rows


def add_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """dx, dx_bias, dresidual, dweight, dbias. dx and dresidual are one tensor where they are equal."""
    T, D = x.shape[:-1].numel(), x.shape[-1]
    dx = torch.empty_like(x)
    same = residual is not None and residual.dtype == x.dtype and dropout_p == 0.0
    dresidual = None if residual is None or same else torch.empty_like(residual)
    with on_device(x):
        tile = norm_bwd_tile(D, x.dtype)
        num_programs = min(triton.cdiv(T, tile.rows), num_partials())
        num_sums = 2 if x_bias is None else 3
        partials = torch.empty(num_sums, num_programs, D, dtype=torch.float32, device=x.device)
        _add_layer_norm_bwd_kernel[(num_programs,)](
            dy, x, x_bias, residual, weight.contiguous(), mean, rstd, dx, dresidual, partials,
            *dropout_args(dropout_p, seed), T, D, tile.rows, tile.cols, tile.num_stages, **tile.options(),
        )  # fmt: skip
    dweight, dbias, *dx_bias = partials.sum(1)
    return (
        dx, None if x_bias is None else dx_bias[0].to(x_bias.dtype), dx if same else dresidual,
        dweight.to(weight.dtype), dbias.to(weight.dtype),
    )  # fmt: skip
