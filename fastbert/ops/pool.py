"""One vector per sequence of a packed batch: a segmented reduction over its tokens."""

from __future__ import annotations

from typing import Any

import torch

from fastbert.ops.dispatch import backend_for, can_look, check_devices

MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


def pool_ref(hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str) -> torch.Tensor:
    """The specification: sums in fp32 (fp64 for fp64); an empty sequence gives zeros."""
    S, D = cu_seqlens.numel() - 1, hidden.shape[-1]
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    empty = (lengths == 0)[:, None]
    zero = hidden.new_zeros(())
    if hidden.shape[0] == 0:
        return hidden.new_zeros(S, D)
    if mode in ("cls", "lasttoken"):
        rows = starts if mode == "cls" else starts + lengths - 1
        return torch.where(empty, zero, hidden[rows.clamp(0, hidden.shape[0] - 1)])
    segments = torch.repeat_interleave(torch.arange(S, device=hidden.device), lengths)
    if mode == "max":
        return torch.where(empty, zero, hidden.gather(0, _first_maximum(hidden.detach(), segments, S)))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    values, weights = hidden.to(wide), torch.ones(hidden.shape[0], dtype=wide, device=hidden.device)
    if mode == "weightedmean":
        weights = torch.arange(1, hidden.shape[0] + 1, device=hidden.device).to(wide) - starts.to(wide)[segments]
        values = values * weights[:, None]
    total = values.new_zeros(S, D).index_add(0, segments, values)
    norm = weights.new_zeros(S).index_add(0, segments, weights).clamp(min=1.0)
    if mode == "mean_sqrt_len_tokens":
        norm = norm.sqrt()
    return (total / norm[:, None]).to(hidden.dtype)


def _first_maximum(hidden: torch.Tensor, segments: torch.Tensor, S: int) -> torch.Tensor:
    """(S, D) row of each segment's maximum; the first one gets the gradient of a tie, as with `torch.max`."""
    T, D = hidden.shape
    index = segments[:, None].expand(-1, D)
    top = hidden.new_zeros(S, D).scatter_reduce(0, index, hidden, "amax", include_self=False)
    rows = torch.arange(T, device=hidden.device)[:, None]
    hits = torch.where((hidden == top[segments]) | hidden.isnan(), rows, T - 1)
    return rows.new_zeros(S, D).scatter_reduce(0, index, hits, "amin", include_self=False)


class PoolFunction(torch.autograd.Function):
    """Saves `cu_seqlens` and, for max, the row of each maximum."""

    @staticmethod
    def forward(ctx: Any, backend: Any, hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str) -> torch.Tensor:
        out, argmax = backend.pool_fwd(hidden, cu_seqlens, mode)
        ctx.backend, ctx.mode, ctx.num_tokens = backend, mode, hidden.shape[0]
        ctx.save_for_backward(cu_seqlens, argmax)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        cu_seqlens, argmax = ctx.saved_tensors
        return None, ctx.backend.pool_bwd(dout.contiguous(), cu_seqlens, ctx.mode, ctx.num_tokens, argmax), None, None


def pool(hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str = "mean") -> torch.Tensor:
    """Pool the tokens of each packed sequence into one vector (Reimers & Gurevych 2019, arXiv 1908.10084, sec. 3).

    Args:
        hidden: (T, D).
        cu_seqlens: (S + 1) int32.
        mode: `cls` first token; `lasttoken`; `max` per feature; `mean`; `mean_sqrt_len_tokens` sum / sqrt(length);
            `weightedmean` mean weighted by 1, 2, ..., length.

    Returns:
        (S, D) in the dtype of `hidden`; sums run in fp32. An empty sequence gives zeros.

    Raises:
        ValueError: unknown mode, or `cu_seqlens` that does not end at T (checked on the CPU).
    """
    if mode not in MODES:
        raise ValueError(f"unknown pooling mode {mode!r}; the modes are {', '.join(MODES)}")
    if can_look(cu_seqlens) and int(cu_seqlens[-1]) != hidden.shape[0]:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])} but hidden has {hidden.shape[0]} tokens")
    check_devices(hidden=hidden, cu_seqlens=cu_seqlens)
    backend = backend_for("pool", hidden)
    if backend is None:
        return pool_ref(hidden, cu_seqlens, mode)
    return PoolFunction.apply(backend, hidden.contiguous(), cu_seqlens, mode)
