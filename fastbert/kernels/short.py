"""Linear layers over few rows, where latency is the time: no program walks all of K where it need not, and each asks
for its share of the weights while the kernel before still runs.

The sums of y = x W^T that are cut along K are added up by the kernel after: `linear_add_norm_fwd`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.add_layer_norm import add_layer_norm_parts_fwd
from fastbert.kernels.common import begin, on_device
from fastbert.kernels.configs import dependent, short_parts, short_tile
from fastbert.kernels.gelu import gelu_of


@triton.jit
def _prefetch(x):
    """Bring the lines of 128 bytes at these addresses to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [x.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["T"])
def _short_linear_kernel(
    x, weight, bias, y, T, N: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a block of y over CHUNK of K; of fp32 sums, one y for each chunk, where there are several. Memory:
    reads its block of W and, from L2, of x; writes y."""
    first_col, first_k, first_row = tl.program_id(0) * COLS, tl.program_id(1) * CHUNK, tl.program_id(2) * ROWS
    rows, cols, depth = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS), tl.arange(0, DEPTH)
    if PDL and first_row == 0:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = triton.next_power_of_2((CHUNK + LINE - 1) // LINE)
        at = tl.minimum(first_k + tl.arange(0, LINES) * LINE, K - 1)
        _prefetch(weight + tl.minimum(cols, N - 1)[:, None] * K + at[None, :])
    begin(PDL)
    x += rows.to(tl.int64)[:, None] * K + (first_k + depth)[None, :]
    weight += cols[:, None] * K + (first_k + depth)[None, :]
    WHOLE: tl.constexpr = K % CHUNK == 0 and CHUNK % DEPTH == 0
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, CHUNK, DEPTH):
        left, right = (rows < T)[:, None], (cols < N)[:, None]
        if not WHOLE:
            inside = (k + depth < CHUNK) & (first_k + k + depth < K)
            left, right = left & inside[None, :], right & inside[None, :]
        acc = tl.dot(
            tl.load(x + k, mask=left, other=0.0), tl.load(weight + k, mask=right, other=0.0).T, acc,
            input_precision="ieee",
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if GELU != "":
        acc = gelu_of(acc, GELU == "tanh")
    y += (tl.program_id(1).to(tl.int64) * T + rows)[:, None] * N + cols[None, :]
    tl.store(y, acc, mask=(rows < T)[:, None] & (cols < N)[None, :])


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str, y: Tensor, parts: int) -> Tensor:
    (T, K), N = x.shape, weight.shape[0]
    tile = short_tile(T, N, x.dtype)
    steps = triton.cdiv(K, tile.depth)
    chunk = triton.cdiv(steps, parts) * tile.depth
    _short_linear_kernel[(triton.cdiv(N, tile.cols), parts, triton.cdiv(T, tile.rows))](
        x, weight, bias, y, T, N, K, gelu, chunk, tile.rows, tile.cols, tile.depth, dependent(),
        **tile.options(dependent()),
    )  # fmt: skip
    return y


def short_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, gelu: str) -> Tensor:
    """f(x W^T + b) in the dtype of x; `gelu` is "", "erf" or "tanh"."""
    with on_device(x):
        return _launch(x, weight, bias, gelu, x.new_empty(x.shape[0], weight.shape[0]), 1)


def linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """See `fastbert.ops.linear`."""
    (T, K), N = x.shape, weight.shape[0]
    with on_device(x):
        parts = short_parts(T, N, K, x.dtype)
        sums = _launch(x, weight, None, "", x.new_empty(parts, T, N, dtype=torch.float32), parts)
        return add_layer_norm_parts_fwd(sums, bias, residual, norm_weight, norm_bias, eps)
