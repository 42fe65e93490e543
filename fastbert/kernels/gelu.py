"""gelu(x + bias), erf or tanh form, and its gradient; arithmetic in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import on_device
from fastbert.kernels.configs import gelu_bwd_tile, gelu_tile, num_partials


@triton.jit
def _tail(z):
    """Phi(-|z|) and the density at z of the normal distribution, off by 7.5e-8 at most (Abramowitz and Stegun 26.2.17):
    half of the instructions that erf takes, and exact where it would cancel."""
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(z))
    density = tl.exp2(-0.7213475204444817 * z * z) * 0.3989422804014327
    m = t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))
    return density * (t * (0.319381530 + t * (-0.356563782 + m))), density


@triton.jit
def _cdf(z, TANH: tl.constexpr):
    """gelu(z) / z and its derivative: of Phi, or of (1 + tanh u) / 2 = sigmoid(2u)."""
    if TANH:
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * z * z)
        small = tl.exp(-1.5957691216057308 * tl.abs(z + 0.044715 * z * z * z))
        large = 1.0 / (1.0 + small)  # sigmoid(|2u|); 1 - p would lose the digits of a small one
        small *= large
        return tl.where(z < 0, small, large), small * large * slope
    small, density = _tail(z)
    return tl.where(z < 0, small, 1.0 - small), density


@triton.jit
def gelu_of(z, TANH: tl.constexpr):
    """gelu(z) in fp32."""
    if TANH:
        p, _ = _cdf(z, TANH)
        return z * p
    small, _ = _tail(z)
    return tl.maximum(z, 0.0) - tl.minimum(tl.abs(z), 100.0) * small  # bounded: infinity times 0 is none


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
        tile = gelu_bwd_tile(F)
        rows, cols = tile.rows, tile.cols
        num_programs = triton.cdiv(T, rows)
        if bias is not None:
            num_programs = min(num_programs, triton.cdiv(num_partials(), triton.cdiv(F, cols)))
        partials = None if bias is None else torch.empty(num_programs, F, dtype=torch.float32, device=x.device)
        _gelu_bwd_kernel[(num_programs, triton.cdiv(F, cols))](
            dy, x, bias, dx, partials, T, F, approximate == "tanh", rows, cols, **tile.options()
        )
    return dx, None if bias is None or partials is None else partials.sum(0).to(bias.dtype)
