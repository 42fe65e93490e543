"""Interleaved timing, measured roofs, result rows. It knows no op and no model."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measurement. Times in ms; `roof` is the percent of the faster of two bounds: bytes / copy, FLOP / GEMM."""

    op: str
    case: str
    backend: str
    mode: str
    dtype: str
    ms_p50: float
    ms_p20: float
    ms_p80: float
    gb_s: float
    tflop_s: float
    roof_percent: float
    device: str
    torch: str
    isa: str
    threads: int
    load: float
    commit: str
    date: str


@dataclass(frozen=True)
class Roofs:
    """What this machine reaches: copy in bytes/s (read + written), GEMM in FLOP/s of the dtype."""

    bytes_s: float
    flop_s: float

    def bound_ms(self, nbytes: float, flop: float) -> float:
        """The least time that the bytes and the arithmetic allow."""
        return 1e3 * max(nbytes / self.bytes_s, flop / self.flop_s)


def interleave(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each function, one call each a round, so that a noisy minute hits all alike."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            _sync()
            start = time.perf_counter()
            function()
            _sync()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_roofs(dtype: torch.dtype, device: str) -> Roofs:
    """A large copy and a large GEMM on this machine, best of several."""
    source = torch.randn(32 << 20, device=device)
    target = torch.empty_like(source)
    a = torch.randn(2048, 2048, device=device).to(dtype)
    copy = min(interleave({"copy": lambda: target.copy_(source)}, 10)["copy"])
    gemm = min(interleave({"gemm": lambda: a @ a}, 10)["gemm"])
    return Roofs(2 * source.nbytes / copy * 1e3, 2 * 2048**3 / gemm * 1e3)


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its cores and widest vector instructions."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} x{os.cpu_count()} {torch.backends.cpu.get_cpu_capability()}"


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """(p50, p20, p80)."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), cuts[1], cuts[7]


def commit() -> str:
    """The short hash of HEAD, with + where the tree differs from it."""
    run = ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    return subprocess.run(run, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip() or "unknown"


def load() -> float:
    """The one-minute load average, where the system has one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def write(rows: Sequence[Any], name: str, key: tuple[str, ...] = ("op", "case", "backend", "mode", "dtype")) -> Path:
    """Replace `results/<name>.csv`'s rows of the same key and keep the others. Rows are dataclasses of one class."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table: dict[tuple[str, ...], dict[str, object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(row[k] for k in key): dict(row) for row in csv.DictReader(file)}
    for row in rows:
        values = asdict(row)
        table[tuple(str(values[k]) for k in key)] = values
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
        writer.writeheader()
        writer.writerows(table[k] for k in sorted(table))
    return path


def today() -> str:
    """ISO date."""
    return date.today().isoformat()


def console() -> Any:
    """The terminal; in a pipe wide enough for a table."""
    from rich.console import Console  # here, as a GPU machine may have torch alone

    return Console(width=None if sys.stdout.isatty() else 140)
