"""`python -m fastbert.kernels --tune`: the fastest of `configs.candidates` on this GPU goes into the file of `tiles`.

Only this command measures. A candidate that does not compile, or gives something else than the static tile, is passed
over; it must beat the static tile by more than noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from fastbert.kernels import configs, tiles
from fastbert.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd
from fastbert.kernels.attention import attention_bwd, attention_fwd
from fastbert.kernels.gelu import gelu_fwd
from fastbert.kernels.linear import linear_gelu_fwd
from fastbert.kernels.tiles import Tile

GAIN = 0.97  # a faster tile takes at most this share of the static one's time

Call = Callable[[], Any]
Timer = Callable[[Call], float]


@dataclass(frozen=True)
class Tuned:
    """What was measured of one kernel at one size: the static tile, and the one to use."""

    kernel: str
    size: int
    static: Tile
    best: Tile
    static_ms: float
    best_ms: float

    def __str__(self) -> str:
        gain = "static" if self.best == self.static else f"{self.static_ms / self.best_ms:.2f}x {self.best}"
        return f"{self.kernel:16}{self.size:6}{self.static_ms:10.4f} ms  {gain}"


def gpu_ms(call: Call) -> float:
    """Median of 20 replays of a call's graph: launching a short kernel takes longer than the kernel. What it reads is
    not in the L2 cache, as little as after other layers."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        call()
    flush, times = torch.empty(64 << 20, dtype=torch.int32, device="cuda"), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _cases(
    tokens: int, length: int, num_heads: int, head_size: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, int, Tile, Call]]:
    """Kernel, size, static tile and a call whose time is the kernel's."""
    D, F = num_heads * head_size, 4 * num_heads * head_size

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    qkv, dout = new(tokens, 3, num_heads, head_size), new(tokens, num_heads, head_size)
    cu = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    rest = (cu, length, head_size**-0.5, 0.0, 0)
    out, lse = attention_fwd(qkv, *rest)
    yield (
        "attention_fwd",
        head_size,
        configs.attention_fwd_tile(head_size, dtype, False),
        (lambda: attention_fwd(qkv, *rest)),
    )
    for kernel, tile in (("attention_dq", configs.attention_dq_tile), ("attention_dkv", configs.attention_dkv_tile)):
        yield kernel, head_size, tile(head_size, dtype, False), lambda: attention_bwd(dout, qkv, out, lse, *rest)
    x, residual, w, inner = new(tokens, D), new(tokens, D), new(D), new(tokens, F)
    _, mean, rstd = add_layer_norm_fwd(x, w, residual, w, w, 1e-12, 0.0, 0)
    yield "norm_fwd", D, configs.norm_tile(D, dtype), lambda: add_layer_norm_fwd(x, w, residual, w, w, 1e-12, 0.0, 0)[0]
    yield (
        "norm_bwd",
        D,
        configs.norm_bwd_tile(D, dtype),
        (lambda: add_layer_norm_bwd(residual, x, w, residual, w, mean, rstd, 0.1, 0)[0]),
    )
    yield "gelu", F, configs.gelu_tile(F, dtype), lambda: gelu_fwd(inner, None, "none")
    weight, bias = new(F, D) * D**-0.5, new(F)
    for kernel, tile_of, rows in (("short", configs.short_tile, x[:128]), ("linear", configs.linear_tile, x)):
        static = tile_of(rows.shape[0], F, dtype)
        yield kernel, F, static, lambda rows=rows: linear_gelu_fwd(rows, weight, bias, "none")  # type: ignore[misc]


def _first(result: Any) -> torch.Tensor:
    return (result[0] if isinstance(result, tuple) else result).float()


def _same(found: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((found - right).abs().max() <= 0.02 * right.abs().max())


def tune(
    timer: Timer = gpu_ms,
    seconds: float = 60.0,
    tokens: int = 16384,
    length: int = 128,
    num_heads: int = 12,
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> Iterator[Tuned]:
    """Measure kernel after kernel, each written as it comes, until `seconds` are over."""
    begun = time.monotonic()
    for kernel, size, static, call in _cases(tokens, length, num_heads, head_size, dtype, device):
        with tiles.trying(kernel, static):
            right = _first(call())
            static_ms = timer(call)
        best, best_ms = static, static_ms
        for tile in configs.candidates(kernel, static):
            if time.monotonic() - begun > seconds:
                return
            with tiles.trying(kernel, tile):
                try:
                    ms = timer(call) if _same(_first(call()), right) else float("inf")
                except (RuntimeError, ValueError, TritonError) as error:
                    print(f"{kernel}: {tile} does not run: {(str(error).splitlines() or [''])[0][:100]}")
                    continue
            if ms < min(best_ms, GAIN * static_ms):
                best, best_ms = tile, ms
        tiles.write({tiles.key_of(kernel, dtype, size): best})
        yield Tuned(kernel, size, static, best, static_ms, best_ms)
