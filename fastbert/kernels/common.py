"""What several kernels share: the dropout hash, as launch arguments and on the device, and the choice of the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def hash32(x):
    """lowbias32 of uint32 `x`; `fastbert.ops.dropout` has the equation."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_keep(seed, threshold, rows, cols):
    """Keep mask of positions `rows` and `cols`, of shapes that broadcast; integers of any width, taken modulo 2^32."""
    key = hash32(seed.to(tl.uint32))
    return hash32(hash32(rows.to(tl.uint32) ^ key) + cols.to(tl.uint32)) >= threshold.to(tl.uint32)


@triton.jit
def begin(PDL: tl.constexpr):
    """Before a kernel touches what the one ahead of it wrote. With PDL (programmatic dependent launch) it came while
    that one still ran, and lets the next one come."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def _wrap32(x: int) -> int:
    """`x` modulo 2^32 as a signed integer: an argument of one type whatever its value, so one compiled kernel."""
    return (x + 2**31) % 2**32 - 2**31


def dropout_args(p: float, seed: int) -> tuple[int | None, int, float]:
    """The launch arguments `seed` (None: no dropout), `threshold` and `keep_scale`."""
    return (_wrap32(seed) if p > 0.0 else None), _wrap32(int(p * 2**32)), 1.0 / (1.0 - p)


def on_device(x: Tensor) -> torch.cuda.device_of:
    """Context in which kernels are launched on the device of `x`."""
    return torch.cuda.device_of(x)
