"""Every block size, number of warps and pipeline depth, by op, width and architecture: the only file to tune."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastbert.kernels import interpreted

MAX_HEAD_SIZE = 128
MAX_FEATURES = 16384  # a row of a norm lies in the registers of one program


class Tile(NamedTuple):
    """A program's block of the output, and how it is compiled."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """Keyword arguments of the launch. Multiply-adds are fused, whatever the default of this Triton."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": self.max_registers}


def architecture() -> int:
    """Compute capability of the target as 10 * major + minor; under the interpreter that of an H100."""
    return 90 if interpreted() else triton.runtime.driver.active.get_current_target().arch


def norm_tile(num_features: int) -> Tile:
    """Rows of layer norm and embedding: a row is never cut, and short rows share a program."""
    if num_features > MAX_FEATURES:
        raise ValueError(f"a row has {num_features} features but the kernels take at most {MAX_FEATURES}")
    cols = max(16, triton.next_power_of_2(num_features))
    return Tile(max(1, 2048 // cols), cols, 4 if cols <= 4096 else 16)


def norm_bwd_tile(num_features: int) -> Tile:
    """As `norm_tile`, with fewer rows: two fp32 sums of the parameters' gradients stay in registers."""
    tile = norm_tile(num_features)
    return tile._replace(rows=max(1, 1024 // tile.cols), num_warps=4 if tile.cols <= 2048 else 16)


def num_partials() -> int:
    """Programs that share the rows of a backward pass, each with its partial sum: four for each multiprocessor."""
    return 4 * {80: 108, 90: 132}.get(architecture(), 128)


RANGES_TILE = Tile(1, 128, 1)
GELU_TILE = Tile(4, 512, 4)
POOL_TILE = Tile(8, 128, 4)
CROSS_ENTROPY_TILE = Tile(1, 4096, 8)


# 128 registers let four programs of 128 threads share a multiprocessor. Triton 3.6 needs 130 left alone, and keeps to
# 128 without a spill; 3.9 would spill 8 to 104 bytes (2026-11-27, ahead of time, sm_90).
_FOUR_PROGRAMS = 128 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else None


def attention_fwd_tile(head_size: int, dtype: torch.dtype, rel_bias: bool) -> Tile:
    """Queries by keys."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if head_size <= 64:
        return Tile(64, 32 if rel_bias else 64, 4, max_registers=_FOUR_PROGRAMS if architecture() >= 90 else None)
    return Tile(64, 32 if rel_bias else 64, 8)


def attention_dq_tile(head_size: int, dtype: torch.dtype, rel_bias: bool) -> Tile:
    """Queries by keys, as many: the diagonals of a relative bias pass from one tile to the next."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if head_size <= 32 else Tile(16, 16, 8, 1)
    if rel_bias:
        return Tile(32, 32, 4)
    return Tile(64, 64, 4 if head_size <= 64 else 8)


def attention_dkv_tile(head_size: int, dtype: torch.dtype, rel_bias: bool) -> Tile:
    """Keys by queries."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if head_size <= 32 else Tile(16, 16, 8, 1)
    if rel_bias and architecture() < 90:  # 64 by 32 spills there: mma.sync has its operands in registers
        return Tile(32, 32, 4)
    return Tile(64, 32, 4 if head_size <= 64 else 8)


def check_head_size(qkv: Tensor) -> None:
    """Raise ValueError for heads that are too wide for the register file."""
    if not 1 <= qkv.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"the triton attention takes head sizes 1 to {MAX_HEAD_SIZE}, got {qkv.shape[3]}")


# Fused linear layers that beat the vendor's GEMM and a kernel after it, by architecture: `benchmarks/gpu.py` measures
# them, and until it has on an architecture, none is used there.
EPILOGUES: dict[int, frozenset[str]] = {}


def linear_tile(num_rows: int, num_cols: int, dtype: torch.dtype) -> tuple[Tile, int]:
    """Rows by columns of y, and the depth of a step."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2), 32
    depth = 128 if dtype.itemsize == 1 else 64
    if num_rows <= 512:  # few rows: narrow tiles, so that every multiprocessor streams weights
        return Tile(64, 32 if num_cols <= 1024 else 64, 4, 4), depth
    if architecture() >= 90:
        return Tile(128, 128, 8, 4), depth
    return Tile(128, 128, 8, 3), depth // 2


def quantize_tile(num_features: int) -> Tile:
    """A row is never cut."""
    return norm_tile(num_features)
