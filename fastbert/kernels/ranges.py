"""Which keys each token sees: (2, T) int32, its first and its past-the-end key.

Attention is a function of these alone, so a CUDA graph of a bucket of T tokens reads them from a static buffer, and
serves any number of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.configs import RANGES_TILE

_given: ContextVar[Tensor | None] = ContextVar("ranges", default=None)


@triton.jit
def _fill(sequence, cu_seqlens, ranges, T, S, BLOCK: tl.constexpr):
    """The ranges of one sequence; number S has the tokens after all of them, which see nothing."""
    first = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < S, other=0)
    stop = tl.where(sequence < S, end, T)
    end = tl.where(sequence < S, end, first)
    for start in range(first, stop, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        tl.store(ranges + tokens, first, mask=tokens < stop)
        tl.store(ranges + T + tokens, end, mask=tokens < stop)


@triton.jit(do_not_specialize=["T", "S"])
def _ranges_kernel(cu_seqlens, ranges, T, S, BLOCK: tl.constexpr):
    """One program: one sequence. Memory: writes 8 T bytes."""
    _fill(tl.program_id(0), cu_seqlens, ranges, T, S, BLOCK)


def fill_ranges(cu_seqlens: Tensor, ranges: Tensor) -> Tensor:
    """Write the ranges of a batch into contiguous (2, T). Tokens after the last sequence see none: their outputs and
    gradients are zeros, so that a batch may be a bucket of a fixed T."""
    T, S = ranges.shape[1], cu_seqlens.numel() - 1
    _ranges_kernel[(S + 1,)](cu_seqlens.contiguous(), ranges, T, S, RANGES_TILE.cols, **RANGES_TILE.options())
    return ranges


@triton.jit(do_not_specialize=["T", "S", "num_tokens"])
def _load_batch_kernel(
    input_ids, position_ids, type_ids, cu_seqlens, ids, ranges, T, S, num_tokens, BLOCK: tl.constexpr
):
    """One program: the ranges of a sequence, or BLOCK tokens' ids. Memory: reads 24 bytes a token, writes 32."""
    program = tl.program_id(0)
    if program <= S:
        _fill(program, cu_seqlens, ranges, num_tokens, S, BLOCK)
    else:
        tokens = (program - S - 1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < T
        tl.store(ids + tokens, tl.load(input_ids + tokens, mask=inside, other=0), mask=tokens < num_tokens)
        ids += num_tokens
        tl.store(ids + tokens, tl.load(position_ids + tokens, mask=inside, other=0), mask=tokens < num_tokens)
        types = tl.zeros((BLOCK,), tl.int64)
        if type_ids is not None:
            types = tl.load(type_ids + tokens, mask=inside, other=0)
        tl.store(ids + num_tokens + tokens, types, mask=tokens < num_tokens)


def load_batch(
    input_ids: Tensor, position_ids: Tensor, type_ids: Tensor | None, cu_seqlens: Tensor, ids: Tensor, ranges: Tensor
) -> None:
    """A batch of T tokens into buffers of more, in one launch: ids (3, N), 0 in the tail, and ranges (2, N) as
    `fill_ranges` writes them."""
    T, S, N = input_ids.numel(), cu_seqlens.numel() - 1, ids.shape[1]
    _load_batch_kernel[(S + 1 + triton.cdiv(N, RANGES_TILE.cols),)](
        input_ids.contiguous(), position_ids.contiguous(), None if type_ids is None else type_ids.contiguous(),
        cu_seqlens.contiguous(), ids, ranges, T, S, N, RANGES_TILE.cols, **RANGES_TILE.options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "half"])
def _cut_kernel(ranges, cut, T, half, BLOCK: tl.constexpr):
    """One program: BLOCK tokens. Memory: reads and writes 8 bytes a token."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(ranges + tokens, mask=tokens < T)
    end = tl.load(ranges + T + tokens, mask=tokens < T)
    tl.store(cut + tokens, tl.maximum(first, tokens - half), mask=tokens < T)
    tl.store(cut + T + tokens, tl.minimum(end, tokens + half + 1), mask=tokens < T)


def cut_ranges(ranges: Tensor, window: int) -> Tensor:
    """The keys of each range at most `window // 2` tokens away."""
    T, cut = ranges.shape[1], torch.empty_like(ranges)
    _cut_kernel[(triton.cdiv(T, RANGES_TILE.cols),)](
        ranges, cut, T, min(window // 2, T), RANGES_TILE.cols, **RANGES_TILE.options()
    )
    return cut


@contextmanager
def given_ranges(ranges: Tensor) -> Iterator[None]:
    """In the block, and this thread, every attention over as many tokens reads these instead of its `cu_seqlens`."""
    token = _given.set(ranges)
    try:
        yield
    finally:
        _given.reset(token)


def token_ranges(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(2, T) int32 ranges of a batch: the ones that are given, or made from `cu_seqlens`."""
    ranges = _given.get()
    if ranges is not None and ranges.shape[1] == num_tokens:
        return ranges
    return fill_ranges(cu_seqlens, torch.empty(2, num_tokens, dtype=torch.int32, device=cu_seqlens.device))
