"""Attention over packed sequences, tiled over tokens, and its gradient (Dao 2023, arXiv 2307.08691, on a token grid).

The keys of a tile of tokens are one contiguous range, from the first key of its first token to the last key of its
last one; so the grid depends on T and H alone: no maximal length, no schedule over sequences, no atomics. A window
of local attention only cuts each token's range.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import begin, dropout_args, dropout_keep, on_device
from fastbert.kernels.configs import (
    attention_dkv_tile,
    attention_dq_tile,
    attention_fwd_tile,
    check_head_size,
    dependent,
)
from fastbert.kernels.ranges import cut_ranges, token_ranges

_LOG2E = tl.constexpr(1.4426950408889634)
_Q, _K, _V = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _offsets(ROWS: tl.constexpr, stride: tl.constexpr, K: tl.constexpr):
    """(ROWS, K padded to a power of two), and the mask of features that exist."""
    dims = tl.arange(0, triton.next_power_of_2(K) if K > 16 else 16)
    return tl.arange(0, ROWS)[:, None] * stride + dims, dims < K


@triton.jit
def _load_rows(x, first, last, column, ROWS: tl.constexpr, stride: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """K features from `column` on of rows `first` to `last` that are `stride` long, all ROWS of them if WHOLE; one
    64-bit address a tile."""
    offsets, dims = _offsets(ROWS, stride, K)
    x += tl.cast(first, tl.int64) * stride + column
    if WHOLE and dims.shape[0] == K:
        return tl.load(x + offsets)
    return tl.load(x + offsets, mask=(first + tl.arange(0, ROWS) < last)[:, None] & dims, other=0.0)


@triton.jit
def _store_rows(x, values, first, last, column, ROWS: tl.constexpr, stride: tl.constexpr, K: tl.constexpr):
    offsets, dims = _offsets(ROWS, stride, K)
    inside = (first + tl.arange(0, ROWS) < last)[:, None] & dims
    tl.store(x + tl.cast(first, tl.int64) * stride + column + offsets, values, mask=inside)


@triton.jit
def _load_bias(rel_bias, queries, keys, head, R):
    """rel_bias[head, clamp(key - query)] in base 2, for queries and keys of shapes that broadcast."""
    offsets = tl.minimum(tl.maximum(keys - queries, 1 - R), R - 1) + R - 1
    return tl.load(rel_bias + head * (2 * R - 1) + offsets).to(tl.float32) * _LOG2E


@triton.jit
def _origin(origins, tokens, low, inside):
    """First tokens of the sequences, from which dropout counts keys: what `low` is unless a window has moved it."""
    if origins is not None:
        low = tl.load(origins + tokens, mask=inside, other=0)
    return low


@triton.jit
def _blocks(ranges, first_row, T, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The keys of ROWS queries, in blocks: the first key, one past the last, how many blocks before those that all of
    the queries see whole, how many of those, and how many after them. Ranges ascend: the outer queries have them all.
    """
    last_row = tl.minimum(first_row + ROWS, T) - 1
    first, inner_first = tl.load(ranges + first_row), tl.load(ranges + last_row)
    inner_last, last = tl.load(ranges + T + first_row), tl.load(ranges + T + last_row)
    before = tl.cdiv(tl.maximum(tl.minimum(inner_first, last) - first, 0), BLOCK)
    whole = tl.maximum(inner_last - (first + before * BLOCK), 0) // BLOCK
    after = tl.cdiv(tl.maximum(last - (first + (before + whole) * BLOCK), 0), BLOCK)
    return first, last, before, whole, after


@triton.jit
def _attend(
    acc, total, top, q, qkv, rel_bias, queries, low, high, origin, start, last, scale, seed, threshold, head, R,
    H: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of keys more: a step of the online softmax, in base 2."""
    keys = start + tl.arange(0, BLOCK_N)
    k = _load_rows(qkv, start, last, (_K * H + head) * K, BLOCK_N, 3 * H * K, K, WHOLE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if rel_bias is not None:
        scores = scores * scale + _load_bias(rel_bias, queries[:, None], keys[None, :], head, R)
        scale = 1.0
    if not WHOLE:
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        scores = tl.where(seen, scores * scale, -float("inf"))
        scale = 1.0
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = higher
    if not WHOLE:
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # the row's keys have not begun
    p = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    if seed is not None:
        rows = (queries * H + head)[:, None]
        p = tl.where(dropout_keep(seed, threshold, rows, keys[None, :] - origin[:, None]), p, 0.0)
    v = _load_rows(qkv, start, last, (_V * H + head) * K, BLOCK_N, 3 * H * K, K, WHOLE)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit(do_not_specialize=["seed", "threshold", "T"])
def _attention_fwd_kernel(
    qkv, rel_bias, ranges, origins, out, lse, scale, seed, threshold, keep_scale, T, R,
    H: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, all their keys by online softmax, those that need no mask first.
    Memory: reads q once, k and v of its sequences once (again in L2 for the next tile), writes out and one fp32 number
    a row."""
    begin(PDL)
    head = tl.program_id(1)
    first_query = tl.program_id(0) * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)
    inside = queries < T
    low = tl.load(ranges + queries, mask=inside, other=T)
    high = tl.load(ranges + T + queries, mask=inside, other=0)
    origin = _origin(origins, queries, low, inside)
    q = _load_rows(qkv, first_query, T, (_Q * H + head) * K, BLOCK_M, 3 * H * K, K, False)
    scale *= _LOG2E
    if rel_bias is None:  # the largest product is then that of the largest score
        q = tl.where(scale < 0.0, -q, q)
        scale = tl.abs(scale)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, q.shape[1]), tl.float32)
    first, last, before, whole, after = _blocks(ranges, first_query, T, BLOCK_M, BLOCK_N)
    for i in range(whole):
        acc, total, top = _attend(
            acc, total, top, q, qkv, rel_bias, queries, low, high, origin, first + (before + i) * BLOCK_N, last, scale,
            seed, threshold, head, R, H, K, BLOCK_N, True,
        )  # fmt: skip
    for i in range(before + after):
        start = first + tl.where(i < before, i, i + whole) * BLOCK_N
        acc, total, top = _attend(
            acc, total, top, q, qkv, rel_bias, queries, low, high, origin, start, last, scale,
            seed, threshold, head, R, H, K, BLOCK_N, False,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a token of no sequence has no keys: out is 0
    _store_rows(out, acc * (keep_scale / total)[:, None], first_query, T, head * K, BLOCK_M, H * K, K)
    tl.store(lse + queries.to(tl.int64) * H + head, top + tl.log2(total), mask=inside)


@triton.jit
def _diagonal_sums(ds, shift: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of ds[i, i + c + shift] over i, for c in [0, BLOCK)."""
    cols = tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :] + shift
    there = (cols >= 0) & (cols < BLOCK)
    return tl.sum(tl.where(there, tl.gather(ds, tl.where(there, cols, 0), 1), 0.0), 0)


@triton.jit(do_not_specialize=["seed", "threshold", "T", "max_seqlen"])
def _attention_dq_kernel(
    dout, qkv, rel_bias, out, lse, ranges, origins, delta, dqkv, diagonals, scale, seed, threshold, keep_scale, T, R,
    max_seqlen, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: dq and delta = sum(dout * out) of BLOCK queries of one head. Memory: reads q, out, dout once, k and
    v of its sequences once, writes dq and delta; with a bias also one partial sum for each diagonal (offset)."""
    head = tl.program_id(1)
    first_query = tl.program_id(0) * BLOCK
    queries = first_query + tl.arange(0, BLOCK)
    inside = queries < T
    low = tl.load(ranges + queries, mask=inside, other=T)
    high = tl.load(ranges + T + queries, mask=inside, other=0)
    origin = _origin(origins, queries, low, inside)
    q = _load_rows(qkv, first_query, T, (_Q * H + head) * K, BLOCK, 3 * H * K, K, False)
    do = _load_rows(dout, first_query, T, head * K, BLOCK, H * K, K, False)
    o = _load_rows(out, first_query, T, head * K, BLOCK, H * K, K, False)
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at = queries.to(tl.int64) * H + head
    tl.store(delta + at, d, mask=inside)
    row_lse = tl.load(lse + at, mask=inside, other=0.0)
    alone = high - low == 1  # a softmax over one key is constant: exactly 0, where dp - delta leaves rounding
    dq = tl.zeros((BLOCK, q.shape[1]), tl.float32)
    carry = tl.zeros((BLOCK,), tl.float32)
    first, last = tl.min(low, 0), tl.max(high, 0)
    if diagonals is not None:
        diagonals += (tl.program_id(0).to(tl.int64) * H + head) * (2 * max_seqlen - 1) + max_seqlen - 1
    offsets = first - first_query + 1 - BLOCK + tl.arange(0, BLOCK)  # key - query of the diagonals that are complete
    for start in range(first, last, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        k = _load_rows(qkv, start, last, (_K * H + head) * K, BLOCK, 3 * H * K, K, False)
        v = _load_rows(qkv, start, last, (_V * H + head) * K, BLOCK, 3 * H * K, K, False)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        if rel_bias is not None:
            scores += _load_bias(rel_bias, queries[:, None], keys[None, :], head, R)
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        p = tl.exp2(tl.where(seen, scores - row_lse[:, None], -float("inf")))
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if seed is not None:
            rows = (queries * H + head)[:, None]
            keep = dropout_keep(seed, threshold, rows, keys[None, :] - origin[:, None])
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = tl.where(alone[:, None], 0.0, p * (dp - d[:, None]))
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if diagonals is not None:
            carry += _diagonal_sums(ds, 1 - BLOCK, BLOCK)
            tl.store(diagonals + offsets, carry, mask=(offsets > -max_seqlen) & (offsets < max_seqlen))
            carry = _diagonal_sums(ds, 1, BLOCK)
            offsets += BLOCK
    if diagonals is not None:
        tl.store(diagonals + offsets, carry, mask=(offsets > -max_seqlen) & (offsets < max_seqlen))
    _store_rows(dqkv, dq * scale, first_query, T, (_Q * H + head) * K, BLOCK, 3 * H * K, K)


@triton.jit
def _dkeys(
    dk, dv, k, v, dout, qkv, rel_bias, lse, delta, keys, low, high, alone, origin, start, last, scale, seed, threshold,
    keep_scale, head, R, H: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv with a block of queries more; scores are (keys, queries)."""
    queries = start + tl.arange(0, BLOCK_M)
    q = _load_rows(qkv, start, last, (_Q * H + head) * K, BLOCK_M, 3 * H * K, K, WHOLE)
    do = _load_rows(dout, start, last, head * K, BLOCK_M, H * K, K, WHOLE)
    at = queries.to(tl.int64) * H + head
    row_lse = tl.load(lse + at, mask=queries < last, other=0.0)
    d = tl.load(delta + at, mask=queries < last, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)
    if rel_bias is not None:
        scores += _load_bias(rel_bias, queries[None, :], keys[:, None], head, R)
    scores -= row_lse[None, :]
    if not WHOLE:
        seen = (queries[None, :] >= low[:, None]) & (queries[None, :] < high[:, None])
        scores = tl.where(seen, scores, -float("inf"))
    p = tl.exp2(scores)
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    kept = p
    if seed is not None:
        rows = (queries * H + head)[None, :]
        keep = dropout_keep(seed, threshold, rows, (keys - origin)[:, None])
        dp = tl.where(keep, dp * keep_scale, 0.0)
        kept = tl.where(keep, p * keep_scale, 0.0)
    dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (dp - d[None, :])
    if not WHOLE:
        ds = tl.where(alone[:, None], 0.0, ds)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["seed", "threshold", "T"])
def _attention_dkv_kernel(
    dout, qkv, rel_bias, lse, ranges, origins, delta, dqkv, scale, seed, threshold, keep_scale, T, R,
    H: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head; the queries that see a token are those that it sees, in a
    window too. Memory: reads k and v once, q and dout of its sequences once, writes dk, dv.
    """
    head = tl.program_id(1)
    first_key = tl.program_id(0) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < T
    low = tl.load(ranges + keys, mask=inside, other=T)
    high = tl.load(ranges + T + keys, mask=inside, other=0)
    origin = _origin(origins, keys, low, inside)
    k = _load_rows(qkv, first_key, T, (_K * H + head) * K, BLOCK_N, 3 * H * K, K, False)
    v = _load_rows(qkv, first_key, T, (_V * H + head) * K, BLOCK_N, 3 * H * K, K, False)
    alone = high - low == 1
    dk = tl.zeros((BLOCK_N, k.shape[1]), tl.float32)
    dv = tl.zeros((BLOCK_N, k.shape[1]), tl.float32)
    first, last, before, whole, after = _blocks(ranges, first_key, T, BLOCK_N, BLOCK_M)
    for i in range(whole):
        dk, dv = _dkeys(
            dk, dv, k, v, dout, qkv, rel_bias, lse, delta, keys, low, high, alone, origin,
            first + (before + i) * BLOCK_M, last, scale, seed, threshold, keep_scale, head, R, H, K, BLOCK_M, True,
        )  # fmt: skip
    for i in range(before + after):
        start = first + tl.where(i < before, i, i + whole) * BLOCK_M
        dk, dv = _dkeys(
            dk, dv, k, v, dout, qkv, rel_bias, lse, delta, keys, low, high, alone, origin, start, last, scale, seed,
            threshold, keep_scale, head, R, H, K, BLOCK_M, False,
        )  # fmt: skip
    _store_rows(dqkv, dk * scale, first_key, T, (_K * H + head) * K, BLOCK_N, 3 * H * K, K)
    _store_rows(dqkv, dv, first_key, T, (_V * H + head) * K, BLOCK_N, 3 * H * K, K)


def _fold_offsets(totals: Tensor, R: int) -> Tensor:
    """(H, 2n - 1) sums by offset from 1 - n to n - 1 -> (H, 2R - 1): offsets past R - 1 count as R - 1."""
    n = (totals.shape[1] + 1) // 2
    if n <= R:
        return torch.nn.functional.pad(totals, (R - n, R - n))
    folded = totals[:, n - R : n + R - 1].clone()
    folded[:, 0] += totals[:, : n - R].sum(1)
    folded[:, -1] += totals[:, n + R - 1 :].sum(1)
    return folded


def _ranges(cu_seqlens: Tensor, T: int, window: int | None) -> tuple[Tensor, Tensor | None]:
    """Ranges of the keys that are seen and, where a window has cut them, the first tokens of the sequences."""
    ranges = token_ranges(cu_seqlens, T)
    return (ranges, None) if window is None else (cut_ranges(ranges, window), ranges[0])


def _forward(
    qkv: Tensor, rel_bias: Tensor | None, window: int | None, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_head_size(qkv)
    T, _, H, K = qkv.shape
    out, lse = qkv.new_empty(T, H, K), torch.empty(T, H, dtype=torch.float32, device=qkv.device)
    R = 0 if rel_bias is None else (rel_bias.shape[1] + 1) // 2
    with on_device(qkv):
        tile = attention_fwd_tile(K, qkv.dtype, rel_bias is not None)
        _attention_fwd_kernel[(triton.cdiv(T, tile.rows), H)](
            qkv, rel_bias, *_ranges(cu_seqlens, T, window), out, lse, scale, *dropout_args(dropout_p, seed), T, R,
            H, K, tile.rows, tile.cols, dependent(), **tile.options(dependent()),
        )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor, qkv: Tensor, rel_bias: Tensor | None, window: int | None, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dqkv, and drel_bias where there is a bias."""
    T, _, H, K = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    dropout = dropout_args(dropout_p, seed)
    R = 0 if rel_bias is None else (rel_bias.shape[1] + 1) // 2
    with on_device(qkv):
        ranges = _ranges(cu_seqlens, T, window)
        tile = attention_dq_tile(K, qkv.dtype, rel_bias is not None)
        grid = (triton.cdiv(T, tile.rows), H)
        diagonals = None
        if rel_bias is not None:
            diagonals = torch.zeros(*grid, 2 * max_seqlen - 1, dtype=torch.float32, device=qkv.device)
        _attention_dq_kernel[grid](
            dout, qkv, rel_bias, out, lse, *ranges, delta, dqkv, diagonals, scale, *dropout, T, R, max_seqlen,
            H, K, tile.rows, **tile.options(),
        )  # fmt: skip
        tile = attention_dkv_tile(K, qkv.dtype, rel_bias is not None)
        _attention_dkv_kernel[(triton.cdiv(T, tile.rows), H)](
            dout, qkv, rel_bias, lse, *ranges, delta, dqkv, scale, *dropout, T, R,
            H, K, tile.rows, tile.cols, **tile.options(),
        )  # fmt: skip
    if rel_bias is None or diagonals is None:
        return dqkv, None
    return dqkv, _fold_offsets(diagonals.sum(0), R).to(rel_bias.dtype)


def attention_fwd(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed -> out (T, H, K), and the log-sum-exp (T, H) fp32 of the
    scaled scores, in base 2. Head sizes 1 to 128."""
    return _forward(qkv, None, None, *rest)


def attention_bwd(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    """dout, qkv, out, lse and the rest as in `attention_fwd` -> dqkv (T, 3, H, K); the same bits in every run."""
    return _backward(dout, qkv, None, None, *rest)[0]


def attention_window_fwd(qkv: Tensor, window: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `attention_fwd`, of the keys at most `window // 2` away."""
    return _forward(qkv, None, window, *rest)


def attention_window_bwd(dout: Tensor, qkv: Tensor, window: int, *rest: Any) -> Tensor:
    """As `attention_bwd`."""
    return _backward(dout, qkv, None, window, *rest)[0]


def attention_rel_bias_fwd(qkv: Tensor, rel_bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As `attention_fwd`, with a bias (H, 2R - 1)."""
    return _forward(qkv, rel_bias, None, *rest)


def attention_rel_bias_bwd(dout: Tensor, qkv: Tensor, rel_bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """As `attention_bwd`, and drel_bias (H, 2R - 1)."""
    return _backward(dout, qkv, rel_bias, None, *rest)
