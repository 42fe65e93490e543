"""out = softmax(Q K^T / sqrt(K) + bias(j - i)) V for every sequence of a packed batch: no token sees another one's.

The bias of key j for query i is optional, and a function of their offset and the head only; so is a window of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from fastbert.ops.dispatch import backend_for, can_look, check_devices
from fastbert.ops.dropout import Seed, check_dropout, dropout_keep


def _runs(cu_seqlens: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(first token, number of sequences, length) of each run of equally long neighbours."""
    start = 0
    for length, run in groupby(cu_seqlens.diff().tolist()):
        count = sum(1 for _ in run)
        yield start, count, length
        start += count * length


def _offset_bias(rel_bias: torch.Tensor, length: int) -> torch.Tensor:
    """(H, length, length): `rel_bias` of each query's (row's) and key's (column's) offset."""
    R = (rel_bias.shape[1] + 1) // 2
    positions = torch.arange(length, device=rel_bias.device)
    return rel_bias[:, (positions - positions[:, None]).clamp(1 - R, R - 1) + R - 1]


def _probs(
    qkv: torch.Tensor,
    start: int,
    count: int,
    length: int,
    scale: float | None,
    rel_bias: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (count, H, length, length), fp32 or wider, and values (count, H, length, K) of one run."""
    H, K = qkv.shape[2:]
    run = qkv[start : start + count * length].view(count, length, 3, H, K)
    q, k, v = run.permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT).to(torch.promote_types(qkv.dtype, torch.float32)) * (K**-0.5 if scale is None else scale)
    if rel_bias is not None:
        scores = scores + _offset_bias(rel_bias.to(scores.dtype), length)
    if window is not None:
        positions = torch.arange(length, device=qkv.device)
        scores = scores.masked_fill((positions - positions[:, None]).abs() > window // 2, -math.inf)
    return torch.softmax(scores, dim=-1), v


def attention_probs(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
    rel_bias: torch.Tensor | None = None,
    window: int | None = None,
) -> list[torch.Tensor]:
    """The exact probabilities of `attention`, in plain PyTorch: S tensors (H, length, length) in the dtype of `qkv`."""
    return [p for run in _runs(cu_seqlens) for p in _probs(qkv, *run, scale, rel_bias, window)[0].to(qkv.dtype)]


def attention_ref(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed = 0,
    rel_bias: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The specification: one dense softmax per sequence, in fp32 for half-precision inputs."""
    H, K = qkv.shape[2:]
    out = [qkv.new_empty(0, H, K)]
    for start, count, length in _runs(cu_seqlens):
        probs, v = _probs(qkv, start, count, length, scale, rel_bias, window)
        if dropout_p > 0.0:
            tokens = torch.arange(start, start + count * length, device=qkv.device).view(count, 1, length, 1)
            rows = tokens * H + torch.arange(H, device=qkv.device).view(H, 1, 1)
            cols = torch.arange(length, device=qkv.device)
            probs = torch.where(dropout_keep(seed, rows, cols, dropout_p), probs / (1.0 - dropout_p), 0.0)
        out.append((probs.to(qkv.dtype) @ v).transpose(1, 2).reshape(count * length, H, K))
    return torch.cat(out)


class AttentionFunction(torch.autograd.Function):
    """Saves qkv, the output and the log-sum-exp of each row; probabilities are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        qkv: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
        dropout_p: float,
        seed: Seed,
        window: int | None,
    ) -> torch.Tensor:
        rest = cu_seqlens, max_seqlen, scale, dropout_p, seed
        if window is None:
            out, lse = backend.attention_fwd(qkv, *rest)
        else:
            out, lse = backend.attention_window_fwd(qkv, window, *rest)
        ctx.backend, ctx.window, ctx.rest = backend, window, rest[1:]
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        qkv, out, lse, cu_seqlens = ctx.saved_tensors
        saved = out, lse, cu_seqlens, *ctx.rest
        if ctx.window is None:
            dqkv = ctx.backend.attention_bwd(dout.contiguous(), qkv, *saved)
        else:
            dqkv = ctx.backend.attention_window_bwd(dout.contiguous(), qkv, ctx.window, *saved)
        return None, dqkv, None, None, None, None, None, None


class AttentionRelBiasFunction(torch.autograd.Function):
    """`AttentionFunction` with a bias: saves that too, and backward sums its gradient over queries and sequences."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        qkv: torch.Tensor,
        rel_bias: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
        dropout_p: float,
        seed: Seed,
    ) -> torch.Tensor:
        out, lse = backend.attention_rel_bias_fwd(qkv, rel_bias, cu_seqlens, max_seqlen, scale, dropout_p, seed)
        ctx.backend, ctx.max_seqlen, ctx.scale, ctx.dropout_p, ctx.seed = backend, max_seqlen, scale, dropout_p, seed
        ctx.save_for_backward(qkv, rel_bias, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        qkv, rel_bias, out, lse, cu_seqlens = ctx.saved_tensors
        dqkv, drel_bias = ctx.backend.attention_rel_bias_bwd(
            dout.contiguous(), qkv, rel_bias, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.dropout_p, ctx.seed
        )
        return None, dqkv, drel_bias, None, None, None, None, None


def attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed = 0,
    rel_bias: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Bidirectional multi-head attention over packed sequences (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Args:
        qkv: (T, 3, H, K) queries, keys and values of all tokens, sequences end to end.
        cu_seqlens: (S + 1) int32, first token of each sequence; `cu_seqlens[S] == T`. Empty sequences are allowed.
        max_seqlen: length of the longest sequence, on the host.
        scale: factor on the scores; None means 1 / sqrt(K).
        dropout_p, seed: dropout on the probabilities at (token * H + head, key); see `fastbert.ops.dropout`.
        rel_bias: (H, 2R - 1) float or None: the scaled score of query i and key j, counted in their own sequence,
            gains `rel_bias[h, clamp(j - i, -(R - 1), R - 1) + R - 1]` (Shaw et al. 2018, arXiv 1803.02155; Raffel et
            al. 2019, arXiv 1910.10683). It has a gradient.
        window: query i sees key j of its sequence only if |i - j| <= window // 2, so at most `window + 1` keys for an
            even one (Beltagy et al. 2020, arXiv 2004.05150); None: all. Not with a `rel_bias`.

    Returns:
        (T, H, K) in the dtype of `qkv`. The softmax runs in fp32 (fp64 for fp64 inputs).
        Saved for backward: `qkv`, the output and the log-sum-exp (T, H); probabilities are recomputed.

    Raises:
        ValueError: shapes or dtypes that do not fit, 2^31 tokens or more, a dropout probability outside [0, 1), a
            negative window, or one beside a `rel_bias`.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape (T, 3, H, K), got {tuple(qkv.shape)}")
    if not torch.compiler.is_compiling() and qkv.shape[0] >= 2**31:  # an unknown size cannot be compared
        raise ValueError(f"qkv has {qkv.shape[0]} tokens but cu_seqlens counts to {2**31 - 1}: split the batch")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must be int32 of shape (S + 1), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if can_look(cu_seqlens) and int(cu_seqlens[-1]) != qkv.shape[0]:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])} but qkv has {qkv.shape[0]} tokens")
    if rel_bias is not None and (rel_bias.ndim != 2 or rel_bias.shape[0] != qkv.shape[2] or rel_bias.shape[1] % 2 == 0):
        raise ValueError(
            f"rel_bias must have shape (H, 2R - 1), an odd number of offsets, got {tuple(rel_bias.shape)} "
            f"for qkv with {qkv.shape[2]} heads"
        )
    check_devices(qkv=qkv, cu_seqlens=cu_seqlens, rel_bias=rel_bias)
    check_dropout(dropout_p)
    if window is not None and (window < 0 or rel_bias is not None):
        raise ValueError(f"window must be at least 0, and has no rel_bias beside it; got window {window}, {rel_bias=}")
    op = "attention_window" if window is not None else "attention" if rel_bias is None else "attention_rel_bias"
    backend = backend_for(op, qkv)
    if backend is None:
        return attention_ref(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, rel_bias, window)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if rel_bias is not None:
        return AttentionRelBiasFunction.apply(
            backend, qkv.contiguous(), rel_bias.contiguous(), cu_seqlens, max_seqlen, scale, dropout_p, seed
        )
    return AttentionFunction.apply(backend, qkv.contiguous(), cu_seqlens, max_seqlen, scale, dropout_p, seed, window)
