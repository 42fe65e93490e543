"""Every block size, number of warps and pipeline depth, by op, width and architecture: the only file to tune.

Choices are static, one for each architecture, unless `python -m fastbert.kernels --tune` has left a faster one of
`CANDIDATES` on this machine (`tiles.py`). Nothing tunes by itself.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastbert.kernels import interpreted
from fastbert.kernels.tiles import Tile, chosen

MAX_HEAD_SIZE = 128
MAX_FEATURES = 16384  # a row of a norm lies in the registers of one program


def architecture() -> int:
    """Compute capability of the target as 10 * major + minor; under the interpreter that of an H100."""
    return 90 if interpreted() else triton.runtime.driver.active.get_current_target().arch


def dependent() -> bool:
    """Whether kernels are launched while the one before still runs, and wait for it themselves: from sm_90 on."""
    return architecture() >= 90 and not interpreted()


def norm_tile(num_features: int, dtype: torch.dtype) -> Tile:
    """Rows of layer norm and embedding: a row is never cut, and short rows share a program."""
    return chosen("norm_fwd", dtype, num_features, _row_tile(num_features))


def _row_tile(num_features: int) -> Tile:
    if num_features > MAX_FEATURES:
        raise ValueError(f"a row has {num_features} features but the kernels take at most {MAX_FEATURES}")
    cols = max(16, triton.next_power_of_2(num_features))
    return Tile(max(1, 2048 // cols), cols, 4 if cols <= 4096 else 16)


def norm_parts_tile(num_features: int) -> Tile:
    """Of few rows: a program each."""
    return _row_tile(num_features)._replace(rows=1)


def norm_bwd_tile(num_features: int, dtype: torch.dtype) -> Tile:
    """As `norm_tile`, with fewer rows: two fp32 sums of the parameters' gradients stay in registers. Rows that are on
    their way while one is computed: 4 stages of 2 warps took 0.75 of the time of none (H200, 768 features)."""
    tile = _row_tile(num_features)
    num_warps = 2 if tile.cols <= 1024 else 4 if tile.cols <= 2048 else 16
    tile = tile._replace(rows=max(1, 1024 // tile.cols), num_warps=num_warps, num_stages=4 if tile.cols <= 2048 else 2)
    return chosen("norm_bwd", dtype, num_features, tile)


def num_partials() -> int:
    """Programs that share the rows of a backward pass, each with its partial sum: four for each multiprocessor."""
    return 4 * {80: 108, 90: 132}.get(architecture(), 128)


RANGES_TILE = Tile(1, 128, 1)
POOL_TILE = Tile(8, 128, 4)
CROSS_ENTROPY_TILE = Tile(1, 4096, 8)


def gelu_tile(num_features: int, dtype: torch.dtype) -> Tile:
    """Rows by features, a block that divides neither."""
    return chosen("gelu", dtype, num_features, Tile(1, 1024, 2))


def gelu_bwd_tile(num_features: int) -> Tile:
    """As `gelu_tile`; a bias has its sums in registers."""
    return Tile(1, 1024, 4) if num_features >= 1024 else Tile(4, 256, 4)


# 65536 registers: 128 a thread let 512 threads share a multiprocessor. Triton 3.6 keeps 64 queries by 64 keys to that;
# 3.9 needs 167 with dropout, and spills when capped to 128 (ahead of time, sm_90).
# On an H200 (2026-11-27, Triton 3.6) three stages took 0.90 of two at S=512 and 0.95 at S=128, uncapped ones 1.1.
_OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def attention_fwd_tile(head_size: int, dtype: torch.dtype, rel_bias: bool) -> Tile:
    """Queries by keys."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if rel_bias:
        return Tile(64, 32, 4 if head_size <= 64 else 8)
    tile = Tile(64, 64, 4 if head_size <= 64 else 8)
    if head_size <= 64 and architecture() >= 90:
        tile = Tile(64, 64, 4, 3, 128 if _OLD_TRITON else 168)
    return chosen("attention_fwd", dtype, head_size, tile)


def attention_dq_tile(head_size: int, dtype: torch.dtype, rel_bias: bool) -> Tile:
    """Queries by keys, as many: the diagonals of a relative bias pass from one tile to the next."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if head_size <= 32 else Tile(16, 16, 8, 1)
    if rel_bias:
        return Tile(32, 32, 4)
    return chosen("attention_dq", dtype, head_size, Tile(64, 64, 4 if head_size <= 64 else 8))


def attention_dkv_tile(head_size: int, dtype: torch.dtype, rel_bias: bool) -> Tile:
    """Keys by queries."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if head_size <= 32 else Tile(16, 16, 8, 1)
    if rel_bias and architecture() < 90:  # 64 by 32 spills there: mma.sync has its operands in registers
        return Tile(32, 32, 4)
    tile = Tile(64, 32, 4 if head_size <= 64 else 8)
    if head_size <= 64 and architecture() >= 90 and not rel_bias:
        tile = Tile(64, 32, 4, 3, 160)  # the whole backward took 0.84 of that with 203 registers (H200, S=512)
    return tile if rel_bias else chosen("attention_dkv", dtype, head_size, tile)


def check_head_size(qkv: Tensor) -> None:
    """Raise ValueError for heads that are too wide for the register file."""
    if not 1 <= qkv.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"the triton attention takes head sizes 1 to {MAX_HEAD_SIZE}, got {qkv.shape[3]}")


# Rows times hidden size up to which `kernels/short.py` computes a model's linear layers: 192 rows of BERT-base. Whole
# models take 0.73 of the vendor's GEMMs' time at 64 rows of it, 0.77 at 128, 0.87 at 192, 1.03 at 256; MiniLM, half as
# wide, 0.76, 0.80, 0.82 and 0.80, and 0.88 at 384 rows (H200, 2026-11-27).
SHORT = 192 * 768
SHORT_OPS = ("linear", "linear_gelu", "linear_add_norm")


def is_short(num_rows: int, weight_shape: tuple[int, ...]) -> bool:
    """Whether a layer with this weight (N, K) has so few rows that its kernel is one of `short.py`."""
    return num_rows * min(weight_shape) <= SHORT


# Linear layers (linear, linear_gelu, linear_add, norm_linear) that beat the vendor's GEMM and the kernel after it, for
# how many rows, by architecture. `python -m benchmarks.gpu` measures them; until it has, none is used there. On 90
# (H200, Triton 3.6, 2026-11-27): linear_gelu takes 0.8 of the time at T = 128 and 0.93 at T = 16384, but 1.1 at 2048,
# where its tiles fill one wave and a half; linear 0.96 at 16384, and the vendor's needs a memset before it.
EPILOGUES: dict[int, dict[str, tuple[range, ...]]] = {
    90: {
        "linear_gelu": (range(1025), range(4096, 1 << 31)),
        "linear": (range(16384, 1 << 31),),
        "linear_add_norm": (),
    }
}


def linear_tile(num_rows: int, num_cols: int, dtype: torch.dtype) -> Tile:
    """Rows by columns of y, and the depth of a step."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2, depth=32)
    depth = 128 if dtype.itemsize == 1 else 64
    if num_rows <= 512:  # few rows: narrow tiles, so that every multiprocessor streams weights
        if num_rows <= 128 or num_cols <= 1024:
            return Tile(64, 32, 4, 4, depth=128)
        return Tile(64, 64 if num_rows <= 256 else 128, 4, 4, depth=depth)
    if dtype.itemsize == 1:  # a group's sums are scaled before they are added: twice the registers
        tile = Tile(128, 128, 8, 3, depth=depth)
    else:
        tile = Tile(128, 128, 4, 3, depth=depth) if architecture() >= 90 else Tile(128, 128, 8, 3, depth=depth // 2)
    return chosen("linear", dtype, num_cols, tile)


def short_tile(num_rows: int, num_cols: int, dtype: torch.dtype) -> Tile:
    """Rows by columns of y, and the depth of a step; narrow where there are fewer tiles than half of
    the multiprocessors."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2, depth=32)
    few = triton.cdiv(num_rows, 64) * triton.cdiv(num_cols, 32) < num_partials() // 8
    return chosen("short", dtype, num_cols, Tile(64, 16 if few else 32, 4, 4, depth=128))


def short_parts(num_rows: int, num_cols: int, depth: int, dtype: torch.dtype) -> int:
    """Into how many chunks a product is cut along its depth: two programs for each multiprocessor, chunks of equal
    numbers of steps."""
    tile = short_tile(num_rows, num_cols, dtype)
    steps = triton.cdiv(depth, tile.depth)
    most = linear_programs() // (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_cols, tile.cols))
    return max(n for n in range(1, max(1, min(steps, most)) + 1) if steps % n == 0)


def linear_programs() -> int:
    """Two for each multiprocessor: one multiplies while the other one's epilogue runs."""
    return num_partials() // 2


def quantize_tile(num_features: int) -> Tile:
    """A row is never cut."""
    return _row_tile(num_features)


def candidates(kernel: str, static: Tile) -> tuple[Tile, ...]:
    """What `--tune` measures beside the static choice."""
    if kernel.startswith("norm"):
        return tuple(static._replace(rows=rows, num_warps=w) for rows in (1, 2, 4) for w in (2, 4))
    return {
        "attention_fwd": (
            Tile(64, 64, 4), Tile(64, 64, 4, 2, 128), Tile(64, 64, 4, 3, 128), Tile(128, 64, 8, 3, 128),
            Tile(128, 64, 8, 2, 128), Tile(64, 32, 4),
        ),
        "attention_dq": (Tile(64, 64, 4, 2, 128), Tile(64, 64, 4, 3), Tile(32, 32, 4)),
        "attention_dkv": (Tile(64, 64, 4), Tile(64, 32, 4), Tile(64, 32, 4, 3), Tile(32, 32, 4)),
        "gelu": (Tile(4, 512, 4), Tile(1, 1024, 4), Tile(16, 256, 4)),
        "short": (Tile(64, 16, 4, 4, depth=128), Tile(64, 32, 4, 4, depth=128), Tile(64, 64, 4, 3, depth=128)),
        "linear": (Tile(128, 128, 8, 3, depth=64), Tile(128, 256, 8, 4, depth=64), Tile(128, 256, 8, 3, depth=64)),
    }[kernel]  # fmt: skip
