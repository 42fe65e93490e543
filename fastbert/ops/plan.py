"""Packing plans, integer arithmetic only: where each real token goes, and which sequences share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

from fastbert.ops.dispatch import backend_for

_IDS = torch.empty(0, dtype=torch.int64)  # stands for token ids where a backend is chosen


def plan_mask_ref(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The specification of `plan_mask`."""
    indices = mask.flatten().nonzero().flatten()
    lengths = mask.sum(dim=1)
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return indices, cu_seqlens, int(lengths.max()) if mask.shape[0] else 0


def plan_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where the kept tokens of a padded batch lie.

    Args:
        mask: (B, L) bool, True = keep; any pattern, also rows without a kept token.

    Returns:
        indices (T) int64 into the flattened (B * L), ascending; cu_seqlens (B + 1) int32; max_seqlen on the host.

    Raises:
        ValueError: the mask is not a bool matrix.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"mask must be bool of shape (B, L), got {mask.dtype} {tuple(mask.shape)}")
    if torch.compiler.is_compiling():
        from fastbert.ops.registered import plan_mask_node

        return plan_mask_node(mask)
    backend = backend_for("plan_mask", mask)
    return plan_mask_ref(mask) if backend is None else backend.plan_mask_fwd(mask.contiguous())


def plan_batches_ref(
    lengths: torch.Tensor, budget_tokens: int, max_sequences: int | None = None
) -> tuple[torch.Tensor, list[int]]:
    """The specification of `plan_batches`."""
    order = torch.sort(lengths, descending=True, stable=True).indices
    bounds, tokens = [0], 0
    for i, length in enumerate(lengths[order].tolist()):
        count = i - bounds[-1]
        if count and (tokens + length > budget_tokens or count == max_sequences):
            bounds.append(i)
            tokens = 0
        tokens += length
    return order, [*bounds, len(order)] if len(order) else [0]


def plan_batches(
    lengths: torch.Tensor, budget_tokens: int, max_sequences: int | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Cut sequences into batches of at most `budget_tokens` tokens, the longest first.

    Args:
        lengths: (S) int64, on the CPU.
        budget_tokens: tokens a batch may hold; a longer sequence has a batch of its own.
        max_sequences: sequences a batch may hold; None = no limit.

    Returns:
        order (S) int64, the sequences by falling length, ties in their given order;
        bounds, of which batch i holds `order[bounds[i]:bounds[i + 1]]`.

    Raises:
        ValueError: a budget or limit below 1, a negative length, or lengths that are not int64 on the CPU.
    """
    if budget_tokens < 1 or (max_sequences is not None and max_sequences < 1):
        raise ValueError(f"budget_tokens and max_sequences must be at least 1, got {budget_tokens} and {max_sequences}")
    if lengths.dtype != torch.int64 or lengths.ndim != 1 or lengths.device.type != "cpu":
        raise ValueError(f"lengths must be (S) int64 on the CPU, got {lengths.dtype} on {lengths.device}")
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    backend = backend_for("plan_batches", lengths)
    if backend is None:
        return plan_batches_ref(lengths, budget_tokens, max_sequences)
    return backend.plan_batches_fwd(lengths.contiguous(), budget_tokens, max_sequences)


def plan_concat_ref(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The specification of `plan_concat`."""
    lengths = [len(s) for s in sequences]
    ids = torch.tensor([index(i) for s in sequences for i in s], dtype=torch.int64)
    positions = torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int64)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return ids, positions, cu_seqlens, max(lengths, default=0)


def plan_concat(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Lay lists of token ids end to end.

    Args:
        sequences: S lists of ints; empty lists are allowed.

    Returns:
        ids (T) int64; positions (T) int64, 0 .. length - 1 in each sequence; cu_seqlens (S + 1) int32; max_seqlen.

    Raises:
        TypeError: an element is not an int.
    """
    backend = backend_for("plan_concat", _IDS)
    return plan_concat_ref(sequences) if backend is None else backend.plan_concat_fwd(sequences)
