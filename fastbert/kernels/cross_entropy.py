"""loss = logsumexp(logits) - logits[label], row by row, and its gradient.

The log-sum-exp is kept as two fp32 numbers, the maximum and the log of the sum of exponentials below it: their sum,
rounded, would cost the probabilities the digits that a logit of 200 leaves after the point.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import on_device
from fastbert.kernels.configs import CROSS_ENTROPY_TILE


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _cross_entropy_fwd_kernel(logits, labels, losses, lse, ignore_index, M, V: tl.constexpr, COLS: tl.constexpr):
    """One program: one row. Memory: reads the row once, writes three numbers. A label outside [0, V) gives NaN."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    label = tl.load(labels + row)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, COLS):
        cols = start + tl.arange(0, COLS)
        x = tl.load(logits + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = higher
    log_total = tl.log(total)
    tl.store(lse + row, top)
    tl.store(lse + M + row, log_total)
    known = (label >= 0) & (label < V)
    x = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(label == ignore_index, 0.0, log_total - (x - top)))


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _cross_entropy_bwd_kernel(
    scale, logits, labels, lse, dlogits, ignore_index, M, V: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """One program: a block of a row. Memory: reads the logits, writes their gradient."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    offsets = row.to(tl.int64) * V + cols
    x = tl.load(logits + offsets, mask=cols < V, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(lse + row) - tl.load(lse + M + row))
    d = (p - (cols == label).to(tl.float32)) * tl.load(scale).to(tl.float32)
    tl.store(dlogits + offsets, tl.where(label == ignore_index, 0.0, d), mask=cols < V)


def cross_entropy_fwd(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Loss (M) fp32 of each row, 0 for an ignored one; maximum and log of the sum of exponentials, (2, M) fp32."""
    M, V = logits.shape
    losses, lse = (torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in ((M,), (2, M)))
    with on_device(logits):
        _cross_entropy_fwd_kernel[(M,)](
            logits, labels, losses, lse, ignore_index, M, V, CROSS_ENTROPY_TILE.cols, **CROSS_ENTROPY_TILE.options()
        )
    return losses, lse


def cross_entropy_bwd(scale: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """dlogits (M, V); `scale` () is the gradient of each labelled row's loss, read on the device."""
    M, V = logits.shape
    dlogits, cols = torch.empty_like(logits), CROSS_ENTROPY_TILE.cols
    with on_device(logits):
        _cross_entropy_bwd_kernel[(M, triton.cdiv(V, cols))](
            scale, logits, labels, lse, dlogits, ignore_index, M, V, cols, **CROSS_ENTROPY_TILE.options()
        )
    return dlogits
