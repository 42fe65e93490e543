"""Interleaved timing, measured roofs, result rows. It knows no op and no model."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert import native

COMMITTED = Path(__file__).parent / "results"
PARTS = 2  # of a run; between them providers' processes start anew
AGREE = 1.1  # what two runs of the same code should agree within
GENERATIONS = (
    ("Zen 2", 23, range(48, 160)),
    ("Zen 4", 25, (*range(16, 32), *range(96, 128), *range(160, 176))),
    ("Zen 3", 25, range(256)),
    ("Zen 5", 26, range(256)),
    ("Ice Lake", 6, (106, 108)),
    ("Sapphire Rapids", 6, (143,)),
    ("Emerald Rapids", 6, (207,)),
    ("Granite Rapids", 6, (173, 174)),
)
# `python -m benchmarks --out` sends the rows of its suites elsewhere.
RESULTS = Path(os.environ.get("FASTBERT_BENCH_OUT", COMMITTED))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where, by what and when a row was measured: the last columns of every file of rows."""

    device: str = field(default_factory=lambda: device_name("cpu"))
    torch: str = field(default_factory=lambda: torch.__version__)
    threads: int = field(default_factory=lambda: torch.get_num_threads())
    load: float = field(default_factory=lambda: load())
    commit: str = field(default_factory=lambda: commit())
    date: str = field(default_factory=lambda: today())


@dataclass(frozen=True)
class Row(Machine):
    """One measurement. Times in ms; `roof_percent` is the share of the larger of two bounds: bytes / copy, FLOP / peak.

    `peak_tflop_s` is the roof of arithmetic, `gemm_tflop_s` what torch's largest GEMM reached; rows that were measured
    before there was a peak have none, and their percent is of the GEMM.
    `times_base` is how many times as fast as the row's base (the reference of an op, the float layer of int8_linear,
    sentence-transformers in fp32) it was, by the faster half of the rounds of both (`fast_half`). `times_low` and
    `times_high` are the least and the largest such ratio of the run's parts. `samples` are the ms of the rounds, for
    `--compare`. `padding_percent` is the share of computed tokens that were padding.
    """

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
    ms_p10: float = math.nan
    times_base: float = math.nan
    times_low: float = math.nan
    times_high: float = math.nan
    padding_percent: float = 0.0
    worst_cosine: float = math.nan
    copy_gb_s: float = math.nan
    gemm_tflop_s: float = math.nan
    peak_tflop_s: float = math.nan
    version: str = ""
    samples: str = ""
    isa: str = field(default_factory=lambda: native.isa() if native.available() else "none")


@dataclass(frozen=True)
class Roofs:
    """What this machine reaches: copy in bytes/s (read + written), arithmetic of a dtype and torch's GEMM in FLOP/s."""

    bytes_s: float
    flop_s: float
    gemm_flop_s: float = math.nan

    def bound_ms(self, nbytes: float, flop: float) -> float:
        """The least time that the bytes and the arithmetic allow."""
        return 1e3 * max(nbytes / self.bytes_s, flop / self.flop_s)

    def beside_cache(self, nbytes: int, device: str) -> Roofs:
        """The same for so few bytes: what fits into a cache is held against a copy that fits into it, too."""
        return replace(self, bytes_s=max(self.bytes_s, copy_bytes_s(nbytes, device)))

    def columns(self) -> dict[str, float]:
        """The fields of a row that say what its percent is of."""
        return {
            "copy_gb_s": round(self.bytes_s / 1e9, 2),
            "gemm_tflop_s": round(self.gemm_flop_s / 1e12, 4),
            "peak_tflop_s": round(self.flop_s / 1e12, 4),
        }


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3, least_ms: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of each function, one sample each a round, so that a noisy minute hits all alike.

    A sample is the mean of as many calls as fill `least_ms`: the clock and the scheduler do not decide about a call of
    microseconds.
    """
    calls = dict.fromkeys(functions, 1)
    for _ in range(warmup):
        for name, function in functions.items():
            calls[name] = max(1, min(1000, math.ceil(least_ms / max(_timed(function, 1), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            times[name].append(_timed(functions[name], calls[name]))
        order.reverse()  # nobody always follows the same one
    return times


def _timed(function: Callable[[], object], calls: int) -> float:
    """Milliseconds a call."""
    _sync()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _sync()
    return 1e3 * (time.perf_counter() - start) / calls


def fast_tenth(times: Sequence[float]) -> float:
    """The tenth percentile: as fast as it was in a tenth of the rounds."""
    return statistics.quantiles(times, n=10, method="inclusive")[0] if len(times) > 1 else times[0]


def fast_half(times: Sequence[float]) -> float:
    """The geometric mean of the faster half of the rounds.

    What else a machine does only adds time, so the slower half says little. But a machine can be fast in a few rounds
    alone, by more for some than for others: a tenth of the rounds is such a state or is not, a mean of half of them
    moves only as far as it was there. Of seven pairs of stored runs, 808 ratios, 27 differed by more than 10 % by the
    tenth percentile, 11 so (CTranslate2's left out; 2026-11-27).
    """
    return statistics.geometric_mean(sorted(times)[: max(1, len(times) // 2)])


def times_base(base: Sequence[float] | None, times: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the base, by the faster half of each.

    Args:
        base: samples of the base, as many as `times`; None gives NaN.
        times: samples of all `PARTS` of a run, one part after the other, all of one size.

    Returns:
        (of the whole run, least of its parts, largest of its parts); the last two NaN where there are too few samples.
    """
    if base is None:
        return (math.nan,) * 3
    ends = [len(times) * i // PARTS for i in range(PARTS + 1)]
    parts = [(base[a:b], times[a:b]) for a, b in pairwise(ends)]
    ratios = [fast_half(b) / fast_half(t) for b, t in parts] if ends[1] else [math.nan]
    whole = fast_half(base) / fast_half(times)
    return round(whole, 3), round(min(ratios), 3), round(max(ratios), 3)


def mark(low: float, high: float) -> str:
    """What a ratio is marked with: "~" where the parts of one run differ by more than two runs should, or nothing."""
    return "~" if high / low > AGREE else ""


def joined(times: Sequence[float]) -> str:
    """Samples as one field of a row."""
    return ";".join(f"{ms:.4g}" for ms in times)


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_GEMMS = {torch.int8: torch._int_mm}


def measure_roofs(dtype: torch.dtype, device: str) -> Roofs:
    """A large copy, and arithmetic: on a CPU what its units do out of registers, elsewhere a large GEMM."""
    a = torch.randn(2048, 2048, device=device).mul(8).to(dtype)
    gemm = 2 * 2048**3 / min(interleave({"torch": partial(_GEMMS.get(dtype, torch.mm), a, a)}, 6)["torch"]) * 1e3
    peak = native.peak_flop_s(dtype, windows=40) if device == "cpu" and native.available() else 0.0
    return Roofs(copy_bytes_s(256 << 20, device), max(peak, gemm), gemm)


@cache
def copy_bytes_s(nbytes: int, device: str) -> float:
    """Bytes a second, read and written, of a copy that moves so many in all: what fits into a cache is faster."""
    source = torch.ones(max(nbytes // 8, 1), device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, 10, least_ms=1.0)["copy"]
    return 2 * source.nbytes / min(times) * 1e3


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its generation, cores and widest vector instructions.

    Virtual machines call several generations of a maker's cores by one name; family and model tell them apart.
    """
    if device != "cpu":
        return torch.cuda.get_device_name()
    model, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        told = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", cpuinfo.read_text(), re.M))
        model = told.get("model name", model)
        if {"cpu family", "model"} <= told.keys():
            model += f" {generation(int(told['cpu family']), int(told['model']))}"
    return f"{model} x{os.cpu_count()} {torch.backends.cpu.get_cpu_capability()}"


def generation(family: int, model: int) -> str:
    """The cores' name by CPUID, of those that servers have; the two numbers of any others."""
    found = [name for name, of, models in GENERATIONS if of == family and model in models]
    return found[0] if found else f"{family}.{model}"


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """(p50, p20, p80)."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), cuts[1], cuts[7]


@cache
def commit() -> str:
    """The short hash of HEAD, with + where the tree differs from it; outside of a checkout the version installed."""
    run = ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    found = (
        subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent) if shutil.which("git") else None
    )
    return (found and found.stdout.strip()) or f"fastbert-engine {fastbert.__version__}"


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
    common = {f.name for f in fields(Machine)}
    columns = sorted((f.name for f in fields(rows[0])), key=lambda name: name in common)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table[k] for k in sorted(table))
    return path


def keep(rows: Sequence[Row], name: str, quick: bool) -> None:
    """Write the rows and say where; those of a quick run never among the committed ones."""
    if quick and RESULTS == COMMITTED:
        print("quick: no rows are written, and these times mean nothing")
    else:
        print(f"load {load()}; {len(rows)} rows in {write(rows, name).relative_to(RESULTS.parent.parent)}")


def file_of(suite: str, device: str) -> str:
    """The name of a suite's rows of a device."""
    return "".join(c if c.isalnum() else "-" for c in f"{suite}-{device_name(device)}".lower())


def today() -> str:
    """ISO date."""
    return date.today().isoformat()


def console() -> Any:
    """The terminal; in a pipe as wide as COLUMNS says, or wide enough for a table."""
    from rich.console import Console  # here, as a GPU machine may have torch alone

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, drawn when the function that this gives is told what share is done: no thread of its own."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(what, *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(what, total=1.0)

        def done(share: float) -> None:
            bar.update(task, completed=share, refresh=True)

        yield done


def short(ms: float) -> str:
    """Three digits of a time."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"


def table(columns: Sequence[str], title: str, num_text: int) -> Any:
    """An empty table of the `rich` package that fits 80 columns: no lines between its own, numbers to the right.

    Args:
        num_text: how many columns hold text; they come first.
    """
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < num_text else "right", no_wrap=True)
    return made
