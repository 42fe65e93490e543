"""`python -m benchmarks.ops`: every op on its BERT-sized cases, each backend against the reference, in turns."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.turns import Cell, Provider, Suite, Times, measure
from fastbert import ops, testing
from fastbert.ops import dispatch

WARM_MS, LEAST_MS = 4.0, 8.0  # of calls before the clock and of a sample: more rounds do more than longer samples


# What int8_linear takes the place of, and is held against: the float layer, on weights of the same values.
FLOAT = "torch-linear"


def float_linear(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `F.linear` for those of `int8_linear`, in the dtype of `x`."""
    weight = (inputs["weight"] * inputs["weight_scale"][:, None]).to(inputs["x"].dtype)
    return {"input": inputs["x"], "weight": weight.contiguous(), "bias": inputs["bias"]}


@dataclass(frozen=True)
class Work:
    """What a forward pass must move and do.

    Attributes:
        nbytes: inputs read once, the output written once.
        flop: of products.
        dtype: in which they are.
    """

    nbytes: int
    flop: int
    dtype: torch.dtype


def traffic(case: testing.Case, inputs: dict[str, Any], output: torch.Tensor) -> tuple[int, int]:
    """(bytes, FLOP) that the forward pass must move and do: inputs read once, the output written once."""
    nbytes = output.nbytes + sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    if case.op == "embed":  # of the tables only the rows that are looked up
        nbytes = output.nbytes * 4
    if case.op == "pool" and inputs["mode"] == "cls":  # of each sequence only the first token
        nbytes = output.nbytes * 2
    flop = 0
    if case.op.startswith("attention"):
        reach = inputs["window"] // 2 if "window" in inputs else inputs["max_seqlen"]
        lengths = inputs["cu_seqlens"].diff().tolist()
        pairs = sum(min(n, i + reach + 1) - max(0, i - reach) for n in lengths for i in range(n))
        flop = 4 * pairs * inputs["qkv"].shape[2] * inputs["qkv"].shape[3]
    if case.op == "int8_linear":
        flop = 2 * output.numel() * inputs["x"].shape[1]
    return nbytes, flop


def forward(function: Callable[..., torch.Tensor], backend: str, inputs: dict[str, Any]) -> torch.Tensor:
    """One forward pass without a graph."""
    with torch.no_grad(), ops.use_backend(backend):
        return function(**inputs)


def training(function: Callable[..., torch.Tensor], backend: str, inputs: dict[str, Any]) -> None:
    """One forward and backward pass."""
    with ops.use_backend(backend):
        function(**inputs).float().sum().backward()
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            value.grad = None


What = tuple[str, str, str]  # the name of a case, dtype, mode
# What runs, and how many times a forward pass's bytes and FLOP it moves and does.
MODES = {"forward": (forward, 1.0), "training": (training, 3.0)}


def keep_memory() -> None:
    """Have glibc keep what is freed: else some processes fault up to 2,000 pages in anew in each call, others none."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, nbytes in ((-3, 32 << 20), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, its maximum; M_TRIM_THRESHOLD
            libc.mallopt(parameter, nbytes)


def caller(backend: str, device: str, whats: Sequence[What]) -> Callable[[What], None]:
    """The function that runs one of `whats` by a backend, in the process that calls this, on inputs that stay there."""
    keep_memory()
    cases = {str(case): case for case in (*testing.CASES, *testing.BENCHMARK_CASES)}
    inputs = {(n, d): cases[n].inputs(getattr(torch, d), device) for n, d in dict.fromkeys(w[:2] for w in whats)}
    if backend == FLOAT:
        inputs = {key: float_linear(given) for key, given in inputs.items()}

    def call(what: What) -> None:
        name, dtype, mode = what
        function = F.linear if backend == FLOAT else testing.PUBLIC[cases[name].op]
        MODES[mode][0](function, dispatch.REFERENCE if backend == FLOAT else backend, inputs[name, dtype])
        if device != "cpu":
            torch.cuda.synchronize()

    return call


def checked(case: testing.Case, dtype: torch.dtype, device: str) -> dict[str, Work]:
    """Backends that have a case, all of them right, what they are held against last; and the work of each."""
    backends = [b for b in (*dispatch.BACKENDS, dispatch.REFERENCE) if dispatch.has(b, case.op, device, dtype)]
    for backend in backends:
        with ops.use_backend(backend):
            testing.check_case(case, dtype, device)  # a red check prints no number
    inputs = case.inputs(dtype, device)
    nbytes, flop = traffic(case, inputs, forward(testing.PUBLIC[case.op], backends[-1], inputs))
    if case.op != "int8_linear":
        return dict.fromkeys(backends, Work(nbytes, flop, dtype))
    wider = (dtype.itemsize - 1) * inputs["weight"].numel() - inputs["weight_scale"].nbytes
    return {**dict.fromkeys(backends, Work(nbytes, flop, torch.int8)), FLOAT: Work(nbytes + wider, flop, dtype)}


def modes_of(case: testing.Case) -> list[str]:
    """Modes of `MODES` that a case has."""
    return [mode for mode in MODES if mode == "forward" or case.trains]


@dataclass(frozen=True)
class Bench:
    """All cases in the dtypes of a run.

    Attributes:
        known: what `checked` found, by case and dtype.
        roofs: by dtype of products.
        device: of all tensors.
    """

    known: dict[tuple[testing.Case, torch.dtype], dict[str, Work]]
    roofs: dict[torch.dtype, harness.Roofs]
    device: str

    @classmethod
    def of(cls, cases: Sequence[testing.Case], dtypes: Sequence[torch.dtype], device: str) -> Bench:
        """Of cases that are right in the dtypes."""
        known = {(case, dtype): checked(case, dtype, device) for dtype in dtypes for case in cases}
        of_products = dict.fromkeys(work.dtype for works in known.values() for work in works.values())
        return cls(known, {dtype: harness.measure_roofs(dtype, device) for dtype in of_products}, device)

    def cells(self, stack: ExitStack) -> list[Cell]:
        """What takes turns. Each backend has a process of its own, as encoders do."""
        able: dict[What, list[str]] = {
            (str(case), str(dtype)[6:], mode): list(works)
            for (case, dtype), works in self.known.items()
            for mode in modes_of(case)
        }
        providers = {}
        for b in dict.fromkeys(chain.from_iterable(able.values())):
            whats = [what for what, backends in able.items() if b in backends]
            providers[b] = stack.enter_context(Provider(b, caller, b, self.device, whats))
        return [
            Cell(what, [providers[b] for b in backends], warm=what, warm_ms=WARM_MS, least_ms=LEAST_MS)
            for what, backends in able.items()
        ]

    def rows(self, found: Iterable[Times]) -> list[harness.Row]:
        """Rows of the samples of all cells."""
        rows = []
        whats = ((*key, works, mode) for key, works in self.known.items() for mode in modes_of(key[0]))
        for (case, dtype, works, mode), times in zip(whats, found, strict=True):
            base = times[list(works)[-1]]
            for backend, ms in times.items():
                nbytes, flop = (MODES[mode][1] * n for n in (works[backend].nbytes, works[backend].flop))
                at = self.roofs[works[backend].dtype].beside_cache(works[backend].nbytes, self.device)
                p50, p20, p80 = harness.percentiles(ms)
                rows.append(
                    harness.Row(
                        case.op, case.name, backend, mode, str(dtype)[6:], *(round(v, 5) for v in (p50, p20, p80)),
                        round(nbytes / p50 / 1e6, 2), round(flop / p50 / 1e9, 4),
                        round(100 * at.bound_ms(nbytes, flop) / p50, 1),
                        round(harness.fast_tenth(ms), 5), *harness.times_base(base, ms),
                        **at.columns(), version=f"torch {torch.__version__}", samples=harness.joined(ms),
                        device=harness.device_name(self.device),
                    )
                )  # fmt: skip
        return rows


def show(rows: Sequence[harness.Row], device: str) -> None:
    """The table."""
    columns = ("op", "case", "dtype", "mode", "backend", "ms p50", "roof", "x ref")
    table = harness.table(columns, f"{harness.device_name(device)}, {torch.get_num_threads()} threads", num_text=5)
    for r in rows:
        table.add_row(
            r.op, r.case, {"float32": "fp32", "bfloat16": "bf16"}.get(r.dtype, r.dtype), r.mode, r.backend,
            harness.short(r.ms_p50), f"{r.roof_percent:.0f} %",
            f"{harness.mark(r.times_low, r.times_high)}{r.times_base:.2f}",
        )  # fmt: skip
    harness.console().print(table)
    kinds = {"int8" if r.op == "int8_linear" and r.backend != FLOAT else r.dtype: r.peak_tflop_s for r in rows}
    peaks = ", ".join(f"{peak:.2f} TFLOP/s in {kind}" for kind, peak in kinds.items())
    print(f"roofs: copy {rows[0].copy_gb_s:.0f} GB/s, arithmetic {peaks}")


def prepare(options: Sequence[str], stack: ExitStack) -> Suite:
    """The suite of `options`: right ops, and backends' processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.add_argument("--dtype", default="float32", help="one or more, separated by commas")
    parser.add_argument("--seconds", type=float, default=80, help="of turns, all together")
    parser.add_argument("--only", help="ops, separated by commas")
    parser.add_argument("--quick", action="store_true", help="a few calls, to see that all works; writes no rows")
    args = parser.parse_args(options)
    seconds, parts = (0.0, 1) if args.quick else (args.seconds, harness.PARTS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    only = args.only.split(",") if args.only else None
    cases = [case for case in testing.BENCHMARK_CASES if only is None or case.op in only]
    dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
    bench = Bench.of(cases, dtypes, device)

    def finish(found: list[Times]) -> None:
        rows = bench.rows(found)
        show(rows, device)
        harness.keep(rows, harness.file_of("ops", device), args.quick)

    return Suite(bench.cells(stack), seconds, parts, finish)


if __name__ == "__main__":
    measure([(prepare, sys.argv[1:])])
