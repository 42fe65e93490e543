"""How a GPU is measured: the setting, the clock, the check before a number, rows as they come."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness
from fastbert import BertConfig, ops
from fastbert.ops import dispatch

BACKEND = "triton"
NEED_KERNELS = ("fused", "torch._scaled_mm")
OURS = ("fastbert", "fused", "float8")
OWN = (*OURS, "fastbert ops", "fastbert graph")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large. `seconds` is the box of a section; what does not fit it is not measured, and said."""

    device: str
    dtype: torch.dtype
    tokens: int
    rounds: int
    seconds: float
    lengths: tuple[int, ...]
    config: BertConfig
    large: BertConfig
    dry: bool

    def model_lengths(self, length: int) -> list[int]:
        return [length] * (self.tokens // length)


def setting(dry: bool, dtype: str, seconds: float) -> Setting:
    """The H100's sizes, or tiny ones."""
    if dry:
        tiny = BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        return Setting("cpu", torch.float32, 32, 2, seconds, (8, 16), tiny, tiny, True)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --dry-run takes every step on the CPU")
    large = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return Setting(
        "cuda", getattr(torch, dtype), 16384, 30, seconds, (32, 64, 128, 256, 512), BertConfig(), large, False
    )


def captured(run: Run, at: Setting) -> Run:
    """The call as a CUDA graph, so that a short kernel's time is not its launch's."""
    if at.device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured, its launches are in its time: {str(error).splitlines()[0][:150]}")
        return run
    return graph.replay


def timed(runs: dict[str, Run], at: Setting) -> dict[str, list[float]]:
    """Milliseconds of each, interleaved; on a GPU by events, with the L2 cache overwritten in between."""
    if at.device == "cpu":
        return harness.interleave(runs, at.rounds, warmup=1)
    for run in runs.values():
        for _ in range(3):
            run()
    flush = torch.empty(64 << 20, dtype=torch.int32, device=at.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(at.rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


@dataclass(frozen=True)
class Peak:
    """Memory of a training step over what is allocated before it."""

    op: str
    case: str
    backend: str
    peak_mb: float
    device: str
    torch: str
    commit: str
    date: str


class Report:
    """Rows as they come: each is printed and in the file before the next is measured."""

    def __init__(self, at: Setting) -> None:
        self.at, self.rows = at, []
        self.roofs = roofs(at)
        name = f"gpu-{harness.device_name(at.device)}".lower()
        self.name = "".join(c if c.isalnum() else "-" for c in name) + ("-dry-run" if at.dry else "")
        what = f"copy {self.roofs.bytes_s / 1e12:.2f} TB/s, GEMM {self.roofs.flop_s / 1e12:.0f} TFLOP/s"
        print(f"{harness.device_name(at.device)}, torch {torch.__version__}; measured roofs: {what}", flush=True)

    def add(
        self, op: str, case: str, mode: str, runs: dict[str, Run], nbytes: float, flop: float, graphs: bool = True
    ) -> dict[str, float]:
        """Measure variants of one thing, as CUDA graphs unless a whole model is called as users call it; the median ms
        of each."""
        runs = {name: captured(run, self.at) for name, run in runs.items()} if graphs else runs
        times = {backend: harness.percentiles(ms) for backend, ms in timed(runs, self.at).items()}
        for backend, ms in times.items():
            self.keep(op, case, backend, mode, ms, nbytes, flop)
        return {backend: p50 for backend, (p50, _, _) in times.items()}

    def subtract(
        self, op: str, case: str, whole: dict[str, float], forward: dict[str, float], nbytes: float, flop: float
    ) -> None:
        """Rows of backward passes: what a forward and backward takes, less what the forward alone took."""
        for backend in whole:
            if backend in forward and whole[backend] > forward[backend]:
                ms = whole[backend] - forward[backend]
                self.keep(op, case, backend, "backward", (ms, math.nan, math.nan), nbytes, flop)

    def keep(
        self, op: str, case: str, backend: str, mode: str, ms: tuple[float, float, float], nbytes: float, flop: float
    ) -> None:
        """Write and print one row; `ms` are the median, and the 20th and 80th percentile."""
        row = harness.Row(
            op, case, backend, mode, str(self.at.dtype)[6:], *(round(v, 5) for v in ms),
            round(nbytes / ms[0] / 1e6, 2), round(flop / ms[0] / 1e9, 4),
            round(100 * self.roofs.bound_ms(nbytes, flop) / ms[0], 1),
            device=harness.device_name(self.at.device), isa=BACKEND, **self.roofs.columns(),
        )  # fmt: skip
        self.rows.append(row)
        harness.write([row], self.name)
        print(
            f"{row.op:20}{row.case:16}{row.mode:10}{row.backend:24}{row.ms_p50:10.4f} ms{row.gb_s:10.0f} GB/s"
            f"{row.tflop_s:9.2f} TFLOP/s{row.roof_percent:7.1f} %",
            flush=True,
        )

    def table(self) -> str:
        """Ours beside the best of the others, at the end."""
        lines = [f"{'op':20}{'case':18}{'mode':10}{'ours ms':>10}{'% roof':>8}   best other"]
        ours = [r for r in self.rows if r.backend in OURS]
        for r in ours:
            rest = [o for o in self.rows if (o.op, o.case, o.mode) == (r.op, r.case, r.mode) and o.backend not in OWN]
            best = min(rest, key=lambda o: o.ms_p50, default=None)
            other = "" if best is None else f"{best.ms_p50:.4f} ms ({best.ms_p50 / r.ms_p50:.2f}x) {best.backend}"
            lines.append(f"{r.op:20}{r.case:18}{r.mode:10}{r.ms_p50:10.4f}{r.roof_percent:8.1f}   {other}")
        return "\n".join(lines)


def roofs(at: Setting) -> harness.Roofs:
    """A copy of 1 GiB and an 8192^3 GEMM of random numbers."""
    words, n = (1 << 12, 64) if at.dry else (1 << 28, 8192)
    source = torch.randn(words, device=at.device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=at.device).to(at.dtype)
    times = timed({"copy": lambda: target.copy_(source), "gemm": lambda: a @ a}, at)
    copy, gemm = (min(times[name]) for name in ("copy", "gemm"))
    flop_s = 2 * n**3 / gemm * 1e3
    return harness.Roofs(2 * source.nbytes / copy * 1e3, flop_s, flop_s)


def tensors(at: Setting, *shape: int) -> torch.Tensor:
    """Random values: zeros draw less power, and run faster."""
    return torch.randn(*shape, device=at.device).to(at.dtype)


def checked(
    name: str, at: Setting, runs: dict[str, Run], right: torch.Tensor, tolerance: float | None = None
) -> dict[str, Run]:
    """The variants that run here and give what `right` says; the others are named with the reason."""
    good = {}
    if tolerance is None:
        tolerance = 1e-4 if at.dtype == torch.float32 else 0.05
    if not has_kernels(at):  # called by name, without a choice of the backend
        runs = {variant: run for variant, run in runs.items() if variant not in NEED_KERNELS}
    for variant, run in runs.items():
        try:
            found = run()
        except Exception as error:  # of whatever compiler: the others still get their numbers
            reason = str(error).splitlines() or [type(error).__name__]
            print(f"{name}: {variant} does not run here: {reason[0][:150]}")
            continue
        error = (found.float() - right.float()).abs().max().item() / right.float().abs().max().item()
        if error < tolerance:
            good[variant] = run
        else:
            print(f"{name}: {variant} is wrong (relative error {error:.2e}): no number")
    return good


def has_kernels(at: Setting) -> bool:
    """Whether our kernels run here."""
    return dispatch.has(BACKEND, "attention", at.device, at.dtype)


def forced(run: Run, at: Setting) -> Run:
    """On our kernels (on a CPU without them: on what is there)."""

    def call() -> Any:
        with ops.use_backend(BACKEND if has_kernels(at) else "reference"):
            return run()

    return call
