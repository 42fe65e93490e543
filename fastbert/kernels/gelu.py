"""gelu(x + bias), erf or tanh form, and its gradient; arithmetic in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import on_device
from fastbert.kernels.configs import gelu_tile, num_partials


@triton.jit
def _cdf(z, TANH: tl.constexpr):
    """gelu(z) / z and its derivative: of Phi, or of (1 + tanh u) / 2 = sigmoid(2u)."""
    if TANH:
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * z * z)
        p = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return p, p * (1.0 - p) * slope
    p = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return p, 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def gelu_of(z, TANH: tl.constexpr):
    """gelu(z) in fp32."""
    p, _ = _cdf(z, TANH)
    return z * p


@triton.jit(do_not_specialize=["T"])
def _gelu_fwd_kernel(x, bias, y, T, F: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program: a block of rows and features. Memory: reads x, writes y, the bias stays in L2."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < T)[:, None] & (cols < F)
    offsets = rows.to(tl.int64)[:, None] * F + cols
    z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + cols, mask=cols < F, other=0.0).to(tl.float32)
    tl.store(y + offsets, gelu_of(z, TANH), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _gelu_bwd_kernel(
    dy, x, bias, dx, partials, T, F: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """One program: every n-th block of rows, for a block of features. Memory: reads dy and x, writes dx, and one
    partial sum of dbias a program."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < T)[:, None] & (cols < F)
        offsets = rows.to(tl.int64)[:, None] * F + cols
        z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + cols, mask=cols < F, other=0.0).to(tl.float32)
        p, slope = _cdf(z, TANH)
        dz = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32) * (p + z * slope)
        tl.store(dx + offsets, dz, mask=inside)
        total += dz
    if partials is not None:
        tl.store(partials + tl.program_id(0).to(tl.int64) * F + cols, tl.sum(total, 0), mask=cols < F)


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """See `fastbert.ops.gelu`."""
    y, T, F = torch.empty_like(x), x.shape[:-1].numel(), x.shape[-1]
    with on_device(x):
        tile = gelu_tile(F, x.dtype)
        rows, cols = tile.rows, tile.cols
        _gelu_fwd_kernel[(triton.cdiv(T, rows), triton.cdiv(F, cols))](
            x, bias, y, T, F, approximate == "tanh", rows, cols, **tile.options()
        )
    return y


def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor | None]:
    """dx and, with a bias, dbias."""
    dx, T, F = torch.empty_like(x), x.shape[:-1].numel(), x.shape[-1]
    with on_device(x):
        tile = gelu_tile(F, x.dtype)
        rows, cols = tile.rows, tile.cols
        num_programs = triton.cdiv(T, rows) if bias is None else min(triton.cdiv(T, rows), num_partials())
        partials = None if bias is None else torch.empty(num_programs, F, dtype=torch.float32, device=x.device)
        _gelu_bwd_kernel[(num_programs, triton.cdiv(F, cols))](
            dy, x, bias, dx, partials, T, F, approximate == "tanh", rows, cols, **tile.options()
        )
    return dx, None if bias is None or partials is None else partials.sum(0).to(bias.dtype)
