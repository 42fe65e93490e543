"""y = x / max(|x|, 1e-12), row by row, in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.common import begin, on_device
from fastbert.kernels.configs import dependent, norm_parts_tile


@triton.jit
def _l2_normalize_fwd_kernel(x, y, D: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):
    """One program: a row. Memory: reads x, writes y."""
    begin(PDL)
    cols = tl.arange(0, COLS)
    offsets = tl.program_id(0).to(tl.int64) * D + cols
    row = tl.load(x + offsets, mask=cols < D, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(row * row, 0))
    tl.store(y + offsets, row / tl.maximum(norm, 1e-12), mask=cols < D)


def l2_normalize_fwd(x: Tensor) -> Tensor:
    """See `fastbert.ops.l2_normalize`."""
    S, D = x.shape
    y = torch.empty(S, D, dtype=torch.float32, device=x.device)
    with on_device(x):
        tile = norm_parts_tile(D)
        _l2_normalize_fwd_kernel[(S,)](x, y, D, tile.cols, dependent(), **tile.options(dependent()))
    return y
