"""dropout(LN(word[ids] + type[types] + position[positions])) and its gradient.

The kernels end at the gradient of the sum, dz; torch adds its rows into the tables, sorted by id: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.add_layer_norm import layer_norm_grad, row_statistics
from fastbert.kernels.common import begin, dropout_args, dropout_keep, on_device
from fastbert.kernels.configs import dependent, norm_bwd_tile, norm_tile, num_partials


@triton.jit
def _gather(ids, table, rows, cols, inside, T, D: tl.constexpr):
    ids = tl.load(ids + rows, mask=rows < T, other=0).to(tl.int64)
    return tl.load(table + ids[:, None] * D + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum(
    input_ids, position_ids, type_ids, word, position, token_type, rows, cols, inside, T, D: tl.constexpr
):  # fmt: skip
    z = _gather(input_ids, word, rows, cols, inside, T, D)
    if type_ids is not None:
        z += _gather(type_ids, token_type, rows, cols, inside, T, D)
    return z + _gather(position_ids, position, rows, cols, inside, T, D)


@triton.jit(do_not_specialize=["seed", "threshold", "T"])
def _embed_fwd_kernel(
    input_ids, position_ids, type_ids, word, position, token_type, weight, bias, y, mean, rstd, eps,
    seed, threshold, keep_scale, T, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a few whole tokens. Memory: reads three ids and three table rows a token, writes y."""
    begin(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < T)[:, None] & (cols < D)
    z = _sum(input_ids, position_ids, type_ids, word, position, token_type, rows, cols, inside, T, D)
    mu, r = row_statistics(z, inside, eps, D)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    out = (z - mu[:, None]) * r[:, None] * w + b
    if seed is not None:
        out = tl.where(dropout_keep(seed, threshold, rows[:, None], cols[None, :]), out * keep_scale, 0.0)
    tl.store(y + rows.to(tl.int64)[:, None] * D + cols, out, mask=inside)
    tl.store(mean + rows, mu, mask=rows < T)
    tl.store(rstd + rows, r, mask=rows < T)


@triton.jit(do_not_specialize=["seed", "threshold", "T"])
def _embed_bwd_kernel(
    dy, input_ids, position_ids, type_ids, word, position, token_type, weight, mean, rstd, dz, partials,
    seed, threshold, keep_scale, T, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program: every n-th group of tokens. Memory: reads dy and three table rows a token, writes dz, and one
    partial sum of dweight and dbias a program."""
    cols = tl.arange(0, COLS)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < T)[:, None] & (cols < D)
        offsets = rows.to(tl.int64)[:, None] * D + cols
        z = _sum(input_ids, position_ids, type_ids, word, position, token_type, rows, cols, inside, T, D)
        mu = tl.load(mean + rows, mask=rows < T, other=0.0)
        r = tl.load(rstd + rows, mask=rows < T, other=0.0)
        g = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            g = tl.where(dropout_keep(seed, threshold, rows[:, None], cols[None, :]), g * keep_scale, 0.0)
        grad, normed = layer_norm_grad(g, z, w, mu, r, inside, D)
        dweight += g * normed
        dbias += g
        tl.store(dz + offsets, grad, mask=inside)
    partials += tl.program_id(0).to(tl.int64) * (2 * D) + cols
    tl.store(partials, tl.sum(dweight, 0), mask=cols < D)
    tl.store(partials + D, tl.sum(dbias, 0), mask=cols < D)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def embed_fwd(
    input_ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1/std (fp32) of each row."""
    T, D = input_ids.shape[0], word.shape[1]
    y, (mean, rstd) = word.new_empty(T, D), torch.empty(2, T, dtype=torch.float32, device=word.device)
    inputs = _contiguous(input_ids, position_ids, type_ids, word, position, token_type, weight, bias)
    with on_device(word):
        tile = norm_tile(D, word.dtype)
        _embed_fwd_kernel[(triton.cdiv(T, tile.rows),)](
            *inputs, y, mean, rstd, eps, *dropout_args(dropout_p, seed), T, D, tile.rows, tile.cols, dependent(),
            **tile.options(dependent()),
        )  # fmt: skip
    return y, mean, rstd


def embed_bwd(
    dy: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """dword, dposition, dtoken_type (dense), dweight, dbias."""
    T, D = dy.shape
    dz = torch.empty_like(dy)
    inputs = _contiguous(input_ids, position_ids, type_ids, word, position, token_type, weight)
    with on_device(dy):
        tile = norm_bwd_tile(D, word.dtype)
        num_programs = min(triton.cdiv(T, tile.rows), num_partials())
        partials = torch.empty(num_programs, 2, D, dtype=torch.float32, device=dy.device)
        _embed_bwd_kernel[(num_programs,)](
            dy, *inputs, mean, rstd, dz, partials, *dropout_args(dropout_p, seed), T, D, tile.rows, tile.cols,
            **tile.options(),
        )  # fmt: skip
    skipped = -1 if padding_idx is None else padding_idx % word.shape[0]  # torch counts a negative one from the end
    add_rows = torch.ops.aten.embedding_dense_backward
    dword = add_rows(dz, input_ids, word.shape[0], skipped, False)
    dposition = add_rows(dz, position_ids, position.shape[0], -1, False)
    dtoken_type = None if token_type is None else add_rows(dz, type_ids, token_type.shape[0], -1, False)
    dweight, dbias = partials.sum(0).to(weight.dtype)
    return dword, dposition, dtoken_type, dweight, dbias
